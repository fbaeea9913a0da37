"""Swappable adapters: one graph of a base, and a file for each adapter of any method, put into it when it runs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.command import Result
from support.decoding import prompts
from support.parity import apart
from support.slots import RULES, Deployed, deploy, stirred
from support.zoo import ZOO
from torch import Tensor

from peftfx import (
    IA3,
    BitFit,
    LlamaAdapter,
    LoRA,
    PeftfxError,
    PromptTuning,
    export_onnx,
    load,
    runtime,
    transform,
)
from peftfx.export import OnnxModel
from peftfx.export.adapter_command import export_adapter_directories
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export.slots.swappable import Slots
from peftfx.graph.fingerprint import fingerprint
from peftfx.graph.slots import SLOTS_FILE, Manifest
from peftfx.model.adapted import AdaptedModel
from peftfx.passes import Evaluate, Merge
from peftfx.serving.adapter_file import read_adapter_file
from peftfx.views.decode import Decode

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy("bert", tmp_path_factory.mktemp("bert"))


def outputs(adapted: AdaptedModel, *, merged: bool) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Calls of the decode view at sizes no capture saw, and what the graph gives, its adapters merged or not."""
    view, graph = adapted.view("decode"), adapted.graph(view="decode")
    assert isinstance(view, Decode)
    if merged and adapted.active:
        graph = Evaluate()(Merge()(graph).graph).graph
    cases = [view.inputs(adapted.base, sizes=sizes, seed=i) for i, sizes in enumerate(view.trials)]
    with torch.no_grad():
        flat = [graph.run(*(case[spec.name] for spec in graph.inputs)) for case in cases]
    return [(case, dict(zip(graph.outputs, values, strict=True))) for case, values in zip(cases, flat, strict=True)]


def farthest(adapted: AdaptedModel, model: OnnxModel, want: list, name: str = "") -> float:
    """The largest difference where the mask shows something, in one output or in all."""
    view, worst = adapted.view("decode"), 0.0
    assert view is not None
    for case, expected in want:
        got = model(**case)
        for output in [name] if name else expected:
            pair = (view.shown(output, case, t[output]) for t in (got, expected))
            worst = max(worst, apart(*pair))
    return worst


LONG = ("p_tuning", "pissa", "prompt and lora", "prompt_tuning")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in LONG else []) for k in RULES])
def test_a_file_of_each_method_makes_one_graph_the_merged_model(llama: Deployed, kind: str, tmp_path: Path) -> None:
    adapted = llama.with_rule(RULES[kind])
    path = export_adapter(adapted, llama.root / "graph", tmp_path / "adapter", check=False)
    want, model = outputs(adapted, merged=True), llama.served.model
    llama.served.load_adapter(path)
    assert farthest(adapted, model, want) < 1e-4
    llama.served.set_adapter(None)
    assert farthest(adapted, model, want, "logits") > 1e-2
    with adapted.disable_adapter():
        assert farthest(adapted, model, outputs(adapted, merged=False)) < 2e-6


def test_what_is_no_file_for_a_graph_and_several_adapters_at_once_are_refused(llama: Deployed, tmp_path: Path) -> None:
    llama.with_rule(RULES["lora"]).save_pretrained(tmp_path)
    with pytest.raises(PeftfxError, match="an adapter in HF PEFT's format") as raised:
        llama.served.load_adapter(tmp_path)
    assert f"peftfx export-adapter --adapter {tmp_path} --for" in raised.value.hint
    with pytest.raises(PeftfxError, match="one adapter at a time"):
        llama.served.set_adapter(["a", "b"])  # type: ignore[arg-type]


def test_onnx_runtime_itself_puts_a_file_in(llama: Deployed, tmp_path: Path) -> None:
    adapted = llama.with_rule(RULES["lora"])
    path = export_adapter(adapted, llama.root / "graph", tmp_path / "adapter", check=False)
    found = ort.LoraAdapter()
    found.Load(str(path))
    options = ort.RunOptions()
    options.add_active_adapter(found)
    session = ort.InferenceSession(str(llama.root / "graph" / "model.onnx"), providers=["CPUExecutionProvider"])
    case, want = outputs(adapted, merged=False)[0]
    (logits,) = session.run(["logits"], {name: t.numpy() for name, t in case.items()}, options)
    assert np.abs(logits - want["logits"].numpy()).max() < 1e-4


def test_generate_and_genai_give_the_adapted_models_tokens(llama: Deployed, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    model = og.Model(str(llama.root / "graph"))
    adapters = og.Adapters(model)
    given, seen = prompts(1), []
    for kind in ("lora", "ia3", "prefix_tuning", "llama_adapter"):
        adapted = llama.with_rule(RULES[kind])
        path = export_adapter(adapted, llama.root / "graph", tmp_path / kind, check=False)
        want = adapted.generate(**given, **options)
        llama.served.load_adapter(path)
        assert torch.equal(llama.served.generate(**given, **options), want)
        seen.append(want)
        adapters.load(str(path), kind)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=want.shape[1], min_length=want.shape[1], do_sample=False)
        generator = og.Generator(model, parameters)
        generator.set_active_adapter(adapters, kind)
        generator.append_tokens(given["input_ids"].numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist() == want[0].tolist()
    llama.served.set_adapter(None)
    assert len({tuple(tokens[0].tolist()) for tokens in seen}) == len(seen)


def test_effects_of_several_add_up_with_weights_and_without(llama: Deployed, tmp_path: Path, peftfx: Run) -> None:
    rules = {"a": LoRA(r=2, target="attention"), "b": LoRA(r=3, lora_alpha=5, target="attention | mlp.up"), "c": IA3()}
    for name, rule in rules.items():
        llama.with_rule(rule).save_pretrained(tmp_path / name)
    adapted = llama.adapted
    for name in "abc":
        adapted.load_adapter(tmp_path / name, name)
    adapted.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", "cat")
    graph, base = llama.root / "graph", llama.root / "base"
    weighted = ("--adapter", f"{tmp_path / 'a'}=0.5", "--adapter", f"{tmp_path / 'b'}=-2")
    result = peftfx("export-adapter", *weighted, "--for", graph, "--output", tmp_path / "sum", "--base", base)
    assert result.code == 0, result.err
    llama.served.load_adapter(tmp_path / "sum.onnx_adapter")
    assert farthest(adapted, llama.served.model, outputs(adapted, merged=False)) < 1e-4
    plain = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b", "--combination", "linear"]
    refused = peftfx("export-adapter", *plain, "--for", graph, "--output", tmp_path / "linear", "--base", base)
    assert refused.code == 2
    assert "no effect on adapters without weights" in refused.err
    for order in (["a", "c"], ["c", "b"]):
        adapted.set_adapter(order)
        llama.served.load_adapter(export_adapter(adapted, graph, tmp_path / "".join(order), check=False))
        assert farthest(adapted, llama.served.model, outputs(adapted, merged=False)) < 1e-4
    llama.served.set_adapter(None)


def test_a_classifier_of_peft_brings_its_head(bert: Deployed, tmp_path: Path) -> None:
    base = ZOO["bert"].build()
    options = {"target_modules": ["query", "value"], "bias": "lora_only"}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="SEQ_CLS", r=4, **options)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    path = export_adapter_directories([str(tmp_path / "adapter")], bert.root / "graph", tmp_path / "out")
    assert "classifier.weight" in read_adapter_file(path)[1]
    inputs = ZOO["bert"].inputs(3, 9, model=base)
    with torch.no_grad():
        want, plain = theirs(**inputs).logits, base(**inputs).logits
    torch.testing.assert_close(bert.served(**inputs).logits, plain, atol=1e-5, rtol=1e-5)
    bert.served.load_adapter(path, "own")
    torch.testing.assert_close(bert.served(**inputs).logits, want, atol=1e-4, rtol=1e-4)
    assert float((want - plain).abs().max()) > 1e-2
    bert.served.set_adapter(None)


@pytest.mark.parametrize(
    "rule", [IA3(), BitFit(), LlamaAdapter(adapter_len=4), LoRA(r=2, use_dora=True, lora_bias=True)]
)
def test_encoders_take_adapters_in_their_forward(bert: Deployed, rule: object, tmp_path: Path) -> None:
    adapted = bert.with_rule(rule)
    bert.served.load_adapter(export_adapter(adapted, bert.root / "graph", tmp_path / "adapter"))
    inputs = ZOO["bert"].inputs(1, 1, model=adapted.base)
    with torch.no_grad():
        torch.testing.assert_close(bert.served(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)
    bert.served.set_adapter(None)


def test_a_graph_of_an_older_peftfx_takes_new_adapters(llama: Deployed, tmp_path: Path) -> None:
    """Its manifest has a fingerprint of some values, and does not say so."""
    shutil.copytree(llama.root / "graph", tmp_path / "graph")
    path, adapted = tmp_path / "graph" / SLOTS_FILE, llama.with_rule(RULES["lora"])
    old = json.loads(path.read_text())
    assert old.pop("fingerprint_version") == 2
    path.write_text(json.dumps({**old, "fingerprint": fingerprint(adapted.base, 1)}))
    made = export_adapter(adapted, tmp_path / "graph", tmp_path / "x", check=False)
    assert runtime.load(tmp_path / "graph", adapter=made).active == "x"


def test_what_does_not_fit_is_refused(llama: Deployed, bert: Deployed, tmp_path: Path, peftfx: Run) -> None:
    graph = llama.root / "graph"
    with pytest.raises(PeftfxError, match=r"no place for a low-rank sum at model.embed_tokens"):
        export_adapter(llama.with_rule(LoRA(r=2, target="embedding")), graph, tmp_path / "x")
    with pytest.raises(PeftfxError, match=r"no place for a scale of the input of model.layers.0.self_attn.k_proj"):
        export_adapter(llama.with_rule(IA3(feedforward_modules=("k_proj",))), graph, tmp_path / "x")
    with pytest.raises(PeftfxError, match="no place for a low-rank sum at lm_head"):
        export_adapter(llama.with_rule(LoRA(r=2, target="head")), graph, tmp_path / "x")
    other = ZOO["llama"].build()
    with torch.no_grad():
        other.model.embed_tokens.weight.view(-1)[1].add_(1)
    with pytest.raises(PeftfxError, match="of another base"):
        export_adapter(transform(other, RULES["lora"]), graph, tmp_path / "x", check=False)
    assert not list(tmp_path.iterdir())
    path = export_adapter(bert.with_rule(IA3()), bert.root / "graph", tmp_path / "bert", check=False)
    with pytest.raises(PeftfxError, match="for another base, not for the LlamaForCausalLM"):
        llama.served.load_adapter(path)
    with pytest.raises(PeftfxError, match="no adapter named 'y'"):
        llama.served.set_adapter("y")
    adapted = llama.with_rule(RULES["lora"])
    with pytest.raises(PeftfxError, match="from the base only"):
        adapted.export(tmp_path / "out", slots="all-linear")
    result = peftfx("run", tmp_path, "--prompt", "w5", "--adapter", path)
    assert result.code == 2
    missing = peftfx("export-adapter", "--adapter", tmp_path, "--for", tmp_path, "--output", tmp_path / "y")
    assert missing.code == 2
    assert SLOTS_FILE in missing.err


@pytest.mark.slow
def test_only_the_sites_that_were_asked_for_have_slots(tmp_path: Path) -> None:
    model = ZOO["gpt2"].build()
    chosen = Slots("attention.value & /.*h.0.*/", prefix=False)
    report = export_onnx(model, tmp_path / "out", view="decode", slots=chosen)
    slots = Manifest.read(tmp_path / "out").slots
    assert report.slots == len(slots)
    assert {s.at for s in slots if s.what == "lora_A"} == {"transformer.h.0.attn.c_attn"}
    prompted = transform(model, PromptTuning(num_virtual_tokens=2))
    with pytest.raises(PeftfxError, match="no place for a soft prompt"):
        export_adapter(prompted, tmp_path / "out", tmp_path / "x")
    prompted.remove()
    adapted = transform(model, LoRA(r=2, target="attention.value", layers_to_transform=0), seed=0)
    path = export_adapter(stirred(adapted, "default"), tmp_path / "out", tmp_path / "adapter")
    assert path.suffix == ".onnx_adapter"
    loaded = load(ZOO["gpt2"].build(), _saved(adapted, tmp_path / "saved"))
    served = runtime.load(tmp_path / "out", adapter=path)
    want = loaded.generate(**prompts(), max_new_tokens=6, do_sample=False)
    assert torch.equal(served.generate(**prompts(), max_new_tokens=6, do_sample=False), want)


def _saved(adapted: AdaptedModel, directory: Path) -> Path:
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_a_quantised_base_keeps_its_adapters_in_floating_point(tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    report = export_onnx(model, tmp_path / "out", view="decode", slots="all-linear", quantize="int8")
    assert report.quantized["model.onnx"]
    adapted = stirred(transform(model, RULES["lora"], "x", seed=0), "x")
    path = export_adapter(adapted, tmp_path / "out", tmp_path / "adapter", check=False)
    served = runtime.load(tmp_path / "out", adapter=path)
    want = outputs(adapted, merged=False)
    assert farthest(adapted, served.model, want, "logits") < 0.2
    served.set_adapter(None)
    assert farthest(adapted, served.model, want, "logits") > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", "bloom", "opt", "gpt_neo", "gpt_j", "gpt_neox", "glm", "falcon", "gemma2", "phi3"]
)
def test_other_decoders_go_the_same_way(name: str, tmp_path: Path) -> None:
    model = ZOO[name].build()
    export_onnx(model, tmp_path / "graph", view="decode", slots="all-linear")
    adapted = transform(model, IA3(), "x", seed=0)
    for kind in ("ia3", "lora", "prompt_tuning", "prefix_tuning", "llama_adapter"):
        adapted.remove()
        adapted.add_adapter("x", RULES[kind], seed=0)
        export_adapter(stirred(adapted, "x"), tmp_path / "graph", tmp_path / kind)  # held against torch


def test_a_length_at_which_the_code_changes_counts_virtual_tokens_too(tmp_path: Path) -> None:
    """Doge leaves out keys beyond a number of them: a text of that length, behind a prefix, was tried and refused."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hf.DogeForCausalLM(
        hf.DogeConfig(vocab_size=64, keep_window_size=40, max_position_embeddings=40, **size)
    ).eval()
    report = export_onnx(model, tmp_path / "graph", slots="all-linear", view="decode")
    assert any("past + prefix + sequence <= 40" in line for line in report.sizes)
