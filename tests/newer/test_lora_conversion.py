"""LoRAs of other adapters, and of the difference of two checkpoints: exact at the full rank, `peft`'s at any."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.adapters.checkpoint_difference import CheckpointDifference
from peftfx.adapters.lora_conversion import lora_of
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.testing.blocks import DenseBlock
from peftfx.testing.models import Text
from peftfx.testing.setup import assert_close, stir

SPEC = Text((DenseBlock(outer=12), DenseBlock(transposed=True, inner=12)))
INPUTS = SPEC.inputs(3, 5, 1)


def adapted(method: peftfx.Method) -> peftfx.AdaptedModel:
    made = peftfx.transform(SPEC.build(), method, inputs=SPEC.inputs(2, 3), seed=0).eval()
    stir(made.adapter("default"), 1)
    return made


@torch.no_grad()
def test_any_update_becomes_a_lora_of_its_rank(tmp_path: Path) -> None:
    ours = adapted(peftfx.LoHa(r=2, target_modules=["0", "1"]))
    want = ours(**INPUTS)
    assert ours.convert_to_lora("default", 4) == pytest.approx(1)  # nothing is cut
    assert ours.active == ("lora",)
    assert_close(ours(**INPUTS), want, 1e-5, "the LoRA")
    ours.save_pretrained(tmp_path, "lora")
    read = peft.PeftModel.from_pretrained(SPEC.build(), tmp_path)
    assert_close(read(**INPUTS), want, 1e-5, "in peft")


@torch.no_grad()
def test_a_weight_without_the_rank_keeps_all_of_its_own(tmp_path: Path) -> None:
    """As a router of a few experts among the weights of a text model; `peft` refuses the rank."""
    layers = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 3, bias=False))
    base, x = copy.deepcopy(layers), torch.randn(5, 12)
    ours = peftfx.transform(layers, peftfx.LoHa(r=2, target_modules=["0", "1"]), inputs={"input": x}, seed=0).eval()
    stir(ours.adapter("default"), 1)
    want = ours(x)
    assert ours.convert_to_lora("default", 4) == pytest.approx(1)
    assert_close(ours(x), want, 1e-5, "the LoRA")
    ours.save_pretrained(tmp_path, "lora")
    assert_close(peft.PeftModel.from_pretrained(base, tmp_path).eval()(x), want, 1e-5, "in peft")
    with pytest.raises(PeftfxError, match="no weight that is changed has rank 13: the largest rank is 12"):
        ours.convert_to_lora("default", 13, "more")


@torch.no_grad()
def test_trained_copies_of_modules_stay_beside_the_lora(tmp_path: Path) -> None:
    ours = adapted(peftfx.LoHa(r=2, target_modules=["0"], modules_to_save=["1"]))
    want = ours(**INPUTS)
    ours.convert_to_lora("default", 4)
    assert_close(ours(**INPUTS), want, 1e-5, "the LoRA")
    ours.save_pretrained(tmp_path, "lora")
    read = peft.PeftModel.from_pretrained(SPEC.build(), tmp_path)
    assert_close(read(**INPUTS), want, 1e-5, "in peft")
    with pytest.raises(PeftfxError, match="its copies of whole modules, and no other tensor"):
        adapted(peftfx.LoRA(r=2, target_modules=["0"], bias="all")).convert_to_lora("default", 4)


@torch.no_grad()
@pytest.mark.parametrize("rank", [2, 0.8])
def test_a_cut_lora_is_that_of_hf_peft(rank: float, tmp_path: Path) -> None:
    ours = adapted(peftfx.LoHa(r=2, target_modules=["0"]))
    ours.save_pretrained(tmp_path / "loha")
    theirs = peft.PeftModel.from_pretrained(SPEC.build(), tmp_path / "loha")
    peft.save_as_lora(tmp_path / "lora", theirs, rank=rank)
    want = peft.PeftModel.from_pretrained(SPEC.build(), tmp_path / "lora").eval()
    kept = ours.convert_to_lora("default", rank)
    assert (rank if isinstance(rank, float) else 0) <= kept < 0.999
    assert_close(ours(**INPUTS), want(**INPUTS), 1e-5, "cut")


@torch.no_grad()
def test_the_difference_of_two_checkpoints_is_a_lora_and_what_it_lacks_is_told() -> None:
    base, tuned = SPEC.build(), SPEC.build()
    for module in tuned.blocks:
        module.weight += torch.randn(module.weight.shape[0], 1) @ torch.randn(1, module.weight.shape[1])
    ours = peftfx.transform(copy.deepcopy(base), peftfx.LoRA(target_modules=["0"]), inputs=SPEC.inputs(2, 3))
    made, _ = lora_of(CheckpointDifference(base, tuned, ours.sites.weights).updates(), 1)
    ours._install("difference", made)
    ours.set_adapter("difference")
    assert_close(ours(**INPUTS), output(tuned), 1e-4, "the difference")
    tuned.blocks[0].bias += 1
    with pytest.warns(PeftfxWarning, match=r"a LoRA cannot hold them: blocks\.0\.bias"):
        CheckpointDifference(base, tuned, ours.sites.weights).tell_left()


def output(model: nn.Module) -> Tensor:
    found = model(**INPUTS)
    assert isinstance(found, Tensor)
    return found


def test_what_is_no_update_of_a_weight_is_refused() -> None:
    ours = adapted(peftfx.BEFT(target_modules=["0"]))
    with pytest.raises(PeftfxError, match="BEFT changes a bias"):
        ours.convert_to_lora("default", 2)
    with pytest.raises(PeftfxError, match="a share between 0 and 1"):
        ours.convert_to_lora("default", 1.5)
    broken = adapted(peftfx.LoHa(r=2, target_modules=["0"]))
    next(broken.adapters.parameters()).data.fill_(torch.nan)
    with pytest.raises(PeftfxError, match=r"the update of this weight holds NaN or an infinity \[.*0\]"):
        broken.convert_to_lora("default", 2)
