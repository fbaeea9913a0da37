"""Adapters that cross between `peft` and peftfx, and how their outputs are compared."""

from __future__ import annotations

from pathlib import Path

import peft
from support.parity import outputs
from torch import Tensor, nn

ABSOLUTE = 1e-5


def load_peft(model: nn.Module, directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, str(directory)).eval()


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a model, or else its first output."""
    found = outputs(model, inputs)
    return found["logits"] if "logits" in found else next(iter(found.values()))


def same(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) <= ABSOLUTE * max(1.0, float(b.abs().max()))
