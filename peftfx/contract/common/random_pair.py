"""A random low-rank pair that all places of a rule read, drawn from a seed as HF PEFT draws it, number for number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Base
from peftfx.sites.site import Site


def random_pair(sites: Sequence[Site], down: int, up: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`A` [down, inputs] and `B` [outputs, up], as large as the largest place, in the dtype of the base's adapters."""
    shapes = [site.shape[::-1] if site.transposed else site.shape for site in sites]
    out, inner = (max(sizes) for sizes in zip(*shapes, strict=True))
    own = torch.Generator().manual_seed(seed)
    a, b = torch.empty(down, inner), torch.empty(out, up)
    for t in (a, b):  # A first; Kaiming's bound is that of what a row reads
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(t.shape[1])
        t.uniform_(-bound, bound, generator=own)
    # HF PEFT rounds it to the dtype of the base.
    rounded = [t.to(like).to(adapter_dtype(like.dtype)) for t in (a, b)]
    return rounded[0], rounded[1]


def own_rows(base: Base, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of `A` and the rows of `B` that a place reads."""
    out, inner = base.weight.shape
    return a if a.shape[1] == inner else a[:, :inner], b if b.shape[0] == out else b[:out]
