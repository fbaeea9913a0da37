"""LoRA's variants are what `docs/methods.md` says of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from method_table.variants import VARIANTS, Variant
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from support.adapted import randomise
from torch import nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.methods import method_named
from peftfx.rules.peft_files import CONFIG, WEIGHTS
from peftfx.testing.parity import _MODELS, _compare_on, compare


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
PLAIN = {"r": 2, "target_modules": ["0", "2"]}
OF = {how: [v for v in VARIANTS if v.how == how] for how in ("works", "read", "refused")}


@pytest.mark.parametrize(
    "variant", [pytest.param(v, id=v.name, marks=() if v.name == "DoRA" else pytest.mark.slow) for v in OF["works"]]
)
def test_one_that_works_is_hf_pefts(variant: Variant) -> None:
    if variant.name == "OLoRA":  # at a Conv1D peft factors the transpose, and its factors have the wrong shapes
        assert _compare_on(method_named("LORA"), {"r": 2, **variant.options}, _MODELS[0], gradients=True)
    else:
        compare(method_named("LORA"), {"r": 2, **variant.options})


@pytest.mark.parametrize("variant", OF["read"], ids=lambda v: v.name)
def test_one_that_needs_data_is_read_and_saved_again(variant: Variant, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**PLAIN)).eval()  # what its start leaves is a LoRA
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | variant.options))
    ours = peftfx.load(base(), tmp_path, inputs={"input": X})
    torch.testing.assert_close(ours(X), theirs(X))
    ours.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / WEIGHTS))
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["init_lora_weights"] == config_start(variant)
    with pytest.raises(PeftfxError, match="starts from"):
        peftfx.transform(base(), peftfx.LoRA(**PLAIN, **variant.options), inputs={"input": X})


def config_start(variant: Variant) -> object:
    return variant.options["init_lora_weights"]


@pytest.mark.parametrize("variant", OF["refused"], ids=lambda v: v.name)
def test_one_that_is_refused_says_why(variant: Variant, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(base()), peft.LoraConfig(**PLAIN))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | variant.options))
    with pytest.raises(PeftfxError, match=variant.told) as caught:
        peftfx.load(base(), tmp_path, inputs={"input": X})
    assert "hint:" in str(caught.value)


def test_bd_lora_names_a_factor_of_each_targeted_layer_and_need_not_of_others(tmp_path: Path) -> None:
    """By default each layer must be named (`match_strict`): each that has a LoRA, and not each that the model runs."""
    patterns = {"target_modules_bd_a": ["2"], "nblocks": 2}
    options = {**PLAIN, "target_modules": ["2"]}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options, use_bdlora=BdLoraConfig(**patterns))).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = peftfx.load(base(), tmp_path, inputs={"input": X})
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(ours.merge_and_unload()(X), theirs(X))
    with pytest.raises(PeftfxError, match=r"patterns name no factor of this layer \[0\]"):
        peftfx.transform(base(), peftfx.LoRA(**PLAIN, use_bdlora=patterns), inputs={"input": X})
