"""What was once a traceback, a hang or a wall of text, each with what its message says now."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from fuzz.adapter_directories import Adapter, Spoil
from fuzz.settle import settle
from fuzz.test_bases import Model, load
from fuzz.twins import ADAPTER, SIZES, Base
from fuzz.values import Change, deep, nested
from torch import nn

import peftfx
from peftfx import LoRA, PeftfxError, runtime
from peftfx.bases.load import load_base
from peftfx.export.command import export_directory
from peftfx.graph.slots import SLOTS_FILE, Manifest
from peftfx.model.plan import make_plan
from peftfx.rules.text import parse_rules
from peftfx.sites.target import explain

CONFIGS: Mapping[str, tuple[Change, str]] = {
    "a size that is a text": (Change("hidden_size", "16"), "hidden_size"),
    "architectures of numbers": (Change("architectures", [5]), "architectures is not a list of names"),
    "a class of another model": (Change("architectures", ["GPT2LMHeadModel"]), "is not of the model_type"),
    "a class that is no model": (
        Change("architectures", ["Trainer"]),
        "neither the adapter nor the model tells the task",
    ),
    "a quantisation that is a text": (Change("quantization_config", "int8"), "quantization_config is not an object"),
    "layers without end": (Change("num_hidden_layers", 10**18), "which cannot be right"),
    "labels without end": (Change("num_labels", 10**30), "which cannot be right"),
    "depth": (Change("rope_parameters", deep(110)), "nested too deeply"),
}
FIELDS: Mapping[str, tuple[str, str, object, str]] = {
    "rank_pattern": ("lora", "rank_pattern", {"(": 2}, "bad regular expression"),
    "feedforward_modules": ("ia3", "feedforward_modules", "(", "bad regular expression"),
    "ranks that are texts": ("lora", "rank_pattern", {"q_proj": "2"}, "the wrong type: rank_pattern"),
    "modules_to_save": ("lora", "modules_to_save", 5, "the wrong type: modules_to_save"),
    "target_modules": ("lora", "target_modules", [5], "the wrong type: target_modules"),
    "layers_to_transform": ("lora", "layers_to_transform", "one", "the wrong type: layers_to_transform"),
    "submodules": ("prompt", "num_transformer_submodules", "2", "the wrong type: num_transformer_submodules"),
    "total_step": ("adalora", "total_step", "20", "the wrong type: total_step"),
    "encoder_hidden_size": ("p_tuning", "encoder_hidden_size", [8], "the wrong type: encoder_hidden_size"),
    "adapter_layers": ("adaption", "adapter_layers", 0.5, "the wrong type: adapter_layers"),
    "infinity": ("lora", "lora_alpha", float("inf"), "the wrong type: lora_alpha"),
    "a scale that float32 lacks": ("lora", "lora_alpha", 1e308, "the wrong type: lora_alpha"),
    "depth": ("lora", "rank_pattern", deep(110), "nested too deeply"),
    "a variant that an empty object turns on": ("lora", "velora_config", {}, "does not support velora_config"),
}
RULES: Mapping[str, tuple[str, str]] = {
    "a list as a key": ("lora(r={[]:1})", "not a Python literal"),
    "layers_pattern": (
        "lora(target_modules=['q_proj'], layers_to_transform=[0], layers_pattern='a(')",
        "bad regular",
    ),
    "a comment": ("lora(# '\nr=1)+f( # '\n)", "these are no options"),
    "a long sum": ("lora(r=1" + "+1" * 9000 + ")", ""),
    "a repetition without end": ("lora@/a{99999999999}/", "bad regular expression"),
    "parentheses": ("lora@" + "(" * 5000, "parentheses inside one another"),
    "a bracket in a bracket": ("lora@/[[/", "bad regular expression"),
    "a bracket that means something else in other languages": ("lora@/[[a]nothing/", "matches no site"),
    "a long text": ("lora@" + "x" * 50000, "matches no site"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_a_base(name: str, base: Base, tmp_path: Path) -> None:
    change, text = CONFIGS[name]
    model = Model((change,))
    model.write(base.root / "base", tmp_path / "base")
    found = settle(lambda: load_base(tmp_path / "base"))
    assert text in found.message
    assert bool(found.message) == bool(text)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_an_adapter(name: str, base: Base, tmp_path: Path) -> None:
    twin, field, value, text = FIELDS[name]
    Adapter(twin, (Change(field, value),)).write(base.twins, tmp_path / "adapter")
    assert text in settle(lambda: base.ours(tmp_path / "adapter")).message


@pytest.mark.parametrize("name", RULES)
def test_a_rule(name: str, base: Base) -> None:
    rule, text = RULES[name]
    found = settle(lambda: make_plan(base.model, base.adapted.sites, parse_rules(rule)))
    assert found.message
    assert text in found.message


def test_signs_without_end_are_read(base: Base) -> None:
    """An even number of negations is none; a long union is a union."""
    sites = base.adapted.sites
    want = [bool(reason.match) for reason in explain(sites, target="mlp")]
    for text in ("~" * 50000 + "mlp", "mlp" + "|mlp" * 5000, "(" * 90 + "mlp" + ")" * 90):
        assert [bool(reason.match) for reason in explain(sites, target=text)] == want
    others = [bool(reason.match) for reason in explain(sites, target="~mlp")]
    assert [bool(reason.match) for reason in explain(sites, target="~" * 50001 + "mlp")] == others != want


@pytest.mark.parametrize("text", [nested(200000), '{"weight_map": 5}', '{"weight_map": {"a": [1]}}', "[]"])
def test_an_index_of_shards(text: str, base: Base, tmp_path: Path) -> None:
    load(Model(index=text), base, tmp_path / "base")
    assert settle(lambda: load_base(tmp_path / "base")).message


def test_options_are_checked_however_a_method_is_made() -> None:
    for make in (lambda: LoRA(r="8"), lambda: LoRA(use_dora="no"), lambda: LoRA(target_modules=[1])):
        with pytest.raises(PeftfxError, match="the wrong type"):
            make()
    assert LoRA(target_modules={"q", "k"}, target=None).target_modules == ("k", "q")
    assert LoRA(target=[re.compile("x"), "mlp"], lora_alpha=16).r == 8


@pytest.mark.parametrize("what", ["no key", "larger"])
def test_the_pair_of_vera(what: str, base: Base, tmp_path: Path) -> None:
    Adapter("vera", tensors=tuple(Spoil(what, key) for key in range(6))).write(base.twins, tmp_path / "adapter")
    assert settle(lambda: base.ours(tmp_path / "adapter")).message


def test_more_ranks_in_a_shared_matrix_than_in_the_config(base: Base, tmp_path: Path) -> None:
    """Only the layers' sizes may be larger there: `peft` refuses it too."""
    Adapter("vera", tensors=(Spoil("larger", 8),)).write(base.twins, tmp_path / "adapter")
    message = settle(lambda: base.ours(tmp_path / "adapter")).message
    assert "vera_A: [6, 24] in the file, [3, 24] in this model" in message


@pytest.mark.parametrize("what", ["scalar", "flat"])
def test_an_embedding_that_is_no_table(what: str, base: Base, tmp_path: Path) -> None:
    Adapter("embedding", tensors=(Spoil(what, 0),)).write(base.twins, tmp_path / "adapter")
    fresh = hf.LlamaForCausalLM.from_pretrained(base.root / "base")
    for load_it in (lambda: base.ours(tmp_path / "adapter"), lambda: peftfx.load(fresh, tmp_path / "adapter")):
        assert "1 of another shape" in (message := settle(load_it).message)
        assert "resize" not in message


def test_complex_numbers_in_an_adapter(base: Base, tmp_path: Path) -> None:
    Adapter("lora", tensors=(Spoil("dtype", 0, torch.complex64),)).write(base.twins, tmp_path / "adapter")
    assert "imaginary part would be lost" in settle(lambda: base.ours(tmp_path / "adapter")).message


@pytest.mark.parametrize(("twin", "field"), [("adalora", "init_r"), ("lora", "r")])
def test_a_rank_without_end(twin: str, field: str, base: Base, tmp_path: Path) -> None:
    Adapter(twin, (Change(field, 10**18),)).write(base.twins, tmp_path / "adapter")
    assert "a tensor that is larger than any memory" in settle(lambda: base.ours(tmp_path / "adapter")).message


def test_a_manifest_without_the_graph_that_runs(exported: Path, tmp_path: Path) -> None:
    directory = tmp_path / "graph"
    shutil.copytree(exported, directory)
    path = directory / SLOTS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "views": {}}), encoding="utf-8")
    found = settle(lambda: runtime.load(directory, threads=1, adapter=directory / ADAPTER))
    assert "the list of graphs lacks 'model', which the model runs" in found.message


def test_a_manifest_with_another_fingerprint(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "graph")
    path = tmp_path / "graph" / SLOTS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "fingerprint": "no"}), encoding="utf-8")
    assert "fingerprint='no'" in settle(lambda: Manifest.read(tmp_path / "graph")).message


class Deciding(nn.Module):
    """It branches on what the model's weights compute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x if x.sum() > 0 else x


def test_a_model_that_cannot_be_captured_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    model.model.norm = Deciding()
    assert "cannot capture this model" in settle(lambda: peftfx.capture(model), 60).message
    assert len(capfd.readouterr().err) < 500


def test_a_rule_on_a_model_of_peft_says_whose_it_is(base: Base) -> None:
    theirs = peft.get_peft_model(
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    message = settle(lambda: peftfx.transform(theirs, LoRA(target_modules=["q_proj"])), 60).message
    assert "already an adapter named 'default'" in message  # theirs, which is taken over


def test_an_adapter_whose_path_no_file_can_have(base: Base) -> None:
    path = "x" * 300
    assert settle(lambda: export_directory(base.root / "base", "out", adapter=path)).message


def test_a_message_fits_on_a_screen_whatever_it_quotes() -> None:
    error = PeftfxError("x\n" * 500, "y" * 5000, "z" * 5000)
    assert len(str(error)) < 2500
    assert len(str(error).split("\n")) <= 26
    assert error.hint == "z" * 5000
