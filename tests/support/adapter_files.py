"""Adapters that cross between `peft` and peftfx, and how their outputs are compared."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from support.parity import outputs
from torch import Tensor, nn

import peftfx

ABSOLUTE = 1e-5


def load_peft(model: nn.Module, directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, str(directory)).eval()


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a model, or else its first output."""
    found = outputs(model, inputs)
    return found["logits"] if "logits" in found else next(iter(found.values()))


def same(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) <= ABSOLUTE * max(1.0, float(b.abs().max()))


def assert_crosses(base: nn.Module, root: Path, inputs: dict[str, Tensor], want: Tensor) -> None:
    """An adapter of `peft` in `root / "theirs"` gives what it gives there: loaded, loaded by `peft` again, and merged.

    Its file, saved again to `root / "ours"`, has the same tensors.
    """
    assert float((want - first(base, inputs)).abs().max()) > 1e-3
    ours = peftfx.load(copy.deepcopy(base), root / "theirs")
    same(first(ours, inputs), want)

    ours.save_pretrained(root / "ours")
    same(first(load_peft(copy.deepcopy(base), root / "ours"), inputs), want)
    ours.load_adapter(root / "ours", "again")
    same(first(ours, inputs), want)
    ours.remove("again")
    ours.set_adapter("default")
    mine, given = (load_file(root / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert mine.keys() == {k for k in given if not k.endswith("base_layer.weight")}
    assert all(torch.equal(mine[k], given[k]) for k in mine)

    ours.merge()
    same(first(ours.remove(), inputs), want)
