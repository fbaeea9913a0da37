"""HF PEFT directories, both ways: what `peft` writes we read, what we write it reads, and the numbers are its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted import randomise
from support.adapter_files import assert_crosses, first, load_peft, same
from support.zoo import ZOO

import peftfx
from peftfx import PeftfxError
from peftfx.model.adapted import AdaptedModel

TARGETS: Mapping[str, list[str]] = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "roberta": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
    "convnext": ["downsampling_layer.1", "pwconv1"],
}
OPTIONS: Mapping[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True},
    "every bias": {"bias": "all"},
    "patterns": {"rank_pattern": {".*0.*": 3, "v": 2}, "alpha_pattern": {"dense": 3, "c_proj": 5}},
    "one layer": {"layers_to_transform": [1]},
    "all linears": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*(q_proj|c_attn|query|\.q|pwconv1)"},
    "a head of its own": {"modules_to_save": ["lm_head", "classifier"]},
}
NAMED = [
    (model, option)
    for model in ("gpt2", "llama", "roberta")
    for option in OPTIONS
    if (model, option) != ("gpt2", "olora")  # peft does not know that Conv1D is stored transposed, and cannot run it
]
QUICK = {
    *(("gpt2", o) for o in ("dora", "gaussian", "patterns", "a regular expression")),
    *(("llama", o) for o in ("olora", "all linears")),
    *(("roberta", o) for o in ("pissa with dora", "rslora", "every bias", "one layer", "a head of its own")),
    ("convnext", "dora"),
}  #: each option, on one model; `pytest -m slow` has every pair
REST = [("t5", "plain"), ("t5", "dora"), ("convnext", "plain"), ("convnext", "dora"), ("convnext", "rslora")]


@pytest.mark.parametrize(
    ("name", "option"), [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in NAMED + REST]
)
def test_an_adapter_crosses_in_both_directions(name: str, option: str, tmp_path: Path) -> None:
    base = ZOO[name].build()
    config = {"target_modules": TARGETS[name], "r": 4, "lora_alpha": 6, **OPTIONS[option]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    randomise(theirs)
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    inputs = ZOO[name].inputs(3, 5, 4, model=base)
    assert_crosses(base, tmp_path, inputs, first(theirs, inputs))


@pytest.mark.parametrize(
    ("name", "embedding", "start"),
    [("gpt2", "wte", True), ("llama", "embed_tokens", "olora"), ("gemma", "embed_tokens", "pissa")],
)
@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_adapted_embedding_crosses_with_its_scale_and_leaves_a_tied_head_alone(
    name: str, embedding: str, start: bool | str, dora: bool, tmp_path: Path
) -> None:
    base = ZOO[name].build()
    options = {"r": 4, "use_dora": dora, "init_lora_weights": start, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=[embedding], **options))
    randomise(theirs)
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    inputs = ZOO[name].inputs(2, 6, 1, model=base)
    want = first(theirs, inputs)
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
    same(first(ours, inputs), want)
    ours.save_pretrained(tmp_path / "ours")
    same(first(load_peft(copy.deepcopy(base), tmp_path / "ours"), inputs), want)
    ours.merge()
    same(first(ours.remove(), inputs), want)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "bloom", "phi3", "falcon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt_neox", "llama"))],
)
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "use_rslora": True},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"use_dora": True})),
    ],
    ids=["both", "plain", "dora"],
)
def test_a_rule_on_part_of_a_fused_projection_is_saved_as_one_lora_on_the_whole(
    name: str, options: dict[str, bool], bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    ours = bare(name)
    ours.add_adapter("default", peftfx.LoRA(r=3, lora_alpha=5, **options), seed=0)
    with torch.no_grad():
        for p in ours.adapters.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    inputs = ZOO[name].inputs(2, 6, 1, model=ours.base)
    want = first(ours, inputs)
    ours.save_pretrained(tmp_path)
    same(first(load_peft(ZOO[name].build(), tmp_path), inputs), want)
    ours.load_adapter(tmp_path, "again")
    same(first(ours, inputs), want)
    ours.remove()


def test_a_half_precision_base_gets_an_adapter_in_fp32_as_in_peft(tmp_path: Path) -> None:
    base = ZOO["llama"].build().to(torch.bfloat16)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    randomise(theirs)
    theirs.eval().save_pretrained(str(tmp_path))
    inputs = ZOO["llama"].inputs(2, 6, 1, model=base)
    ours = peftfx.load(copy.deepcopy(base), tmp_path)
    assert {p.dtype for p in ours.adapters.parameters()} == {torch.float32}
    assert torch.equal(first(ours, inputs), first(theirs, inputs))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter for the zoo's LLaMA, to be damaged."""
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


Refused = Callable[..., str]


@pytest.fixture
def refused(bare: Callable[[str], AdaptedModel]) -> Refused:
    """`refused(directory)`: why it is no adapter of the zoo's LLaMA, or of another of its models."""

    def message(directory: Path, name: str = "llama") -> str:
        with pytest.raises(PeftfxError) as caught:
            bare(name).load_adapter(directory, "default")
        return str(caught.value)

    return message


def test_all_that_does_not_fit_is_listed_at_once(saved: Path, refused: Refused) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn"
    del tensors[f"{stem}.q_proj.lora_A.weight"]
    tensors[f"{stem}.v_proj.lora_A.weight"] = torch.zeros(4, 31)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, saved / "adapter_model.safetensors")
    message = refused(saved)
    assert "1 missing" in message
    assert "layers.0.self_attn.q_proj.lora_A.weight" in message
    assert "1 unexpected" in message
    assert "layers.9.self_attn.q_proj" in message
    assert "[4, 31] in the file, [4, 32] in this model" in message


def test_an_adapter_of_another_model_is_refused(saved: Path, refused: Refused) -> None:
    assert "does not fit" in refused(saved, "gpt2")


def test_a_target_of_the_config_that_has_no_keys_is_missing(saved: Path, refused: Refused) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if "layers.1.self_attn.v_proj" not in k}
    save_file(kept, saved / "adapter_model.safetensors")
    assert "every key of model.layers.1.self_attn.v_proj" in refused(saved)


def test_nothing_is_unpickled(saved: Path, refused: Refused) -> None:
    torch.save({}, saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    assert "does not unpickle" in refused(saved)


def test_a_truncated_file_is_refused(saved: Path, refused: Refused) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or damaged" in refused(saved)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"use_qalora": True}, "does not support use_qalora=True"),
        ({"layer_replication": [[0, 1]]}, "does not support layer_replication"),
        ({"init_lora_weights": "evo"}, "unknown initialisation 'evo'"),
        ({"init_lora_weights": "corda"}, "corda moves the base's weights"),
        ({"init_lora_weights": "loftq"}, "loftq moves the base's weights"),
        ({"r": 0}, "rank must be 1 or more"),
    ],
)
def test_an_option_that_would_change_numbers_is_refused(
    saved: Path, change: dict[str, object], expected: str, refused: Refused
) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert expected in refused(saved)


def test_a_key_of_a_module_that_never_runs_is_neither_missing_nor_an_error(tmp_path: Path) -> None:
    """T5's `shared` is only a name for its embeddings; peft adapts and saves it all the same."""
    base = ZOO["t5"].build()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["shared", "q"], r=2))
    randomise(theirs)
    theirs.eval().save_pretrained(str(tmp_path))
    inputs = ZOO["t5"].inputs(2, 6, 1, model=base)
    with pytest.warns(peftfx.errors.PeftfxWarning, match=r"shared\.lora_embedding_A") as told:
        ours = peftfx.load(copy.deepcopy(base), tmp_path)
    assert told[0].filename == __file__, "the warning points at the caller's line"
    same(first(ours, inputs), first(theirs, inputs))


def test_the_config_names_the_base_that_was_adapted_and_its_class(tmp_path: Path) -> None:
    """A config that is used again names another base; and without a task `AutoPeftModel` needs the base's class."""
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    base = type(ZOO["llama"].build()).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="some/other")
    adapted = peftfx.transform(base, config)
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = peft.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    inputs = ZOO["llama"].inputs(model=base)
    torch.testing.assert_close(theirs(**inputs).logits, adapted.eval()(**inputs).logits)
    peftfx.load(base, tmp_path / "adapter", "again").save_pretrained(tmp_path / "again")
    again, first = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("again", "adapter"))
    assert again == first
