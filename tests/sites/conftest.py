"""A pattern that several files of tests look for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.patterns.pattern import Pattern, forget

WIDE = {"x": "batch length width"}


@pytest.fixture(scope="module")
def swiglu() -> Iterator[Pattern]:
    """A SwiGLU, in two spellings."""

    @peftfx.pattern("mlp.swiglu", **WIDE, gate="inner width", up="inner width", down="width inner")
    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    @swiglu.also(**WIDE, both="2*inner width", down="width inner")
    def fused(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, both).chunk(2, -1)
        return F.linear(up * F.silu(gate), down)

    yield swiglu
    forget([swiglu.name])
