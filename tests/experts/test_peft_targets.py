"""New adapters on mixtures from `peft`'s configs: those tensors that `get_peft_model` trains, at its ranks and scales.

`peft` turns the names that experts and routers had before transformers stacked them into `target_parameters`.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from support.mixtures import MIXTURES, mixture

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel

QUICK = ("mixtral", "qwen3_moe")
EACH = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MIXTURES]
NAMES = {"mixtral": ["q_proj", "w1", "w2", "w3"]}  #: of the experts' layers, before they were stacked
OTHERS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
NO_DEFAULT = ("mixtral", "qwen3_moe", "olmoe")  #: `peft` adds no module here by itself
KINDS = ("all linear", "names", "expression", "ranks", "scale", "parameters")
RANKS = {"rank_pattern": {"q_proj": 3, "down_proj": 4}, "alpha_pattern": {"experts.down_proj": 9}}


def options(name: str, kind: str) -> dict[str, object]:
    experts = NAMES.get(name, OTHERS)
    named = {"target_modules": experts}
    bare = {"target_parameters": ["experts.gate_up_proj"]}
    return {
        "all linear": {"target_modules": "all-linear"},
        "names": named,
        "expression": {"target_modules": rf".*\.({'|'.join(experts)})"},
        "ranks": named | RANKS,
        "scale": {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True},
        "parameters": bare if name in NO_DEFAULT else bare | {"target_modules": []},
    }[kind]


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EACH)
def test_a_config_trains_what_peft_trains(name: str, kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, **options(name, kind))
    before = copy.deepcopy(config)
    ours = peftfx.transform(mixture(name), config)
    assert config == before  # peft writes into the config that it is given, this does not
    theirs = peft.get_peft_model(mixture(name), config)
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert shapes(peftfx.get_peft_model_state_dict(ours)) == shapes(state)

    randomise(ours)
    ours.eval().save_pretrained(tmp_path)
    call = {"input_ids": torch.arange(3, 15).view(2, 6)}
    want = ours(**call).logits
    assert float((want - mixture(name)(**call).logits).abs().max()) > 1e-3
    peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(mixture(name), str(tmp_path))
    for model in (theirs, loaded, peftfx.load(mixture(name), tmp_path)):
        torch.testing.assert_close(model.eval()(**call).logits, want, atol=2e-5, rtol=1e-4)


def test_it_is_exported_as_peft_computes(tmp_path: Path) -> None:
    ours = peftfx.transform(mixture("qwen3_moe"), peft.LoraConfig(r=2, target_modules="all-linear"))
    randomise(ours)
    ours.eval().save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(mixture("qwen3_moe"), str(tmp_path / "adapter")).eval()
    for merge in (True, False):
        ours.export(tmp_path / str(merge), view="forward", merge=merge)
        for rows, length in ((2, 6), (1, 3)):
            call = {"input_ids": torch.arange(rows * length).view(rows, length)}
            call["attention_mask"] = torch.ones_like(call["input_ids"])
            got = OnnxModel(tmp_path / str(merge))(**call)["logits"]
            torch.testing.assert_close(got, theirs(**call).logits, atol=1e-4, rtol=1e-4)


def test_a_second_adapter_is_converted_too() -> None:
    ours = peftfx.transform(mixture("mixtral"), peft.LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"]))
    ours.add_adapter("two", peft.LoraConfig(r=3, target_modules=r".*(_proj|\.w[123])"))
    config = peft.LoraConfig(r=3, target_modules=r".*(_proj|\.w[123])")
    theirs = peft.get_peft_model(mixture("mixtral"), config, "two")
    state = peft.get_peft_model_state_dict(theirs, adapter_name="two")
    assert shapes(peftfx.get_peft_model_state_dict(ours, "two")) == shapes(state)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target_modules": ["q_proj", "gate_proj"]}, "without also targeting up_proj"),
        ({"target_modules": "all-linear", "use_dora": True}, "cannot have use_dora"),
    ],
)
def test_what_peft_refuses_is_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=r"gate_proj|use_dora"):
        peft.get_peft_model(mixture("qwen3_moe"), peft.LoraConfig(**asked))
    with pytest.raises(PeftfxError, match=said):
        peftfx.transform(mixture("qwen3_moe"), peft.LoraConfig(**asked))


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_dense_layers_that_peft_takes_for_experts_are_told(name: str, tmp_path: Path) -> None:
    """`peft` adapts the experts in their place, and finds no tensors for these in the file."""
    dense = name == "deepseek_v3"
    ours = peftfx.transform(mixture(name), peftfx.LoRA(r=2, target="mlp.down" if dense else "experts | attention"))
    randomise(ours)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours.eval().save_pretrained(tmp_path)
        again = peftfx.load(mixture(name), tmp_path)
        theirs = peft.PeftModel.from_pretrained(mixture(name), str(tmp_path)).eval()
    found = [str(w.message) for w in told if "takes the names for those of experts" in str(w.message)]
    assert len(found) == 2 * dense  # at the save and at the load
    call = {"input_ids": torch.arange(3, 15).view(2, 6)}
    want = ours(**call).logits.detach()
    torch.testing.assert_close(again(**call).logits, want)
    assert (float((theirs(**call).logits - want).abs().max()) > 1e-2) == dense
