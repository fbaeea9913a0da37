"""A random low-rank pair that all places of a rule share. The numbers are those that HF PEFT draws from the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Base
from peftfx.sites.site import Site


def random_pair(sites: Sequence[Site], down: int, up: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `A` [down, inputs] and `B` [outputs, up], as large as the largest site, in the adapters' dtype."""
    shapes = [site.shape[::-1] if site.transposed else site.shape for site in sites]
    out, inner = (max(sizes) for sizes in zip(*shapes, strict=True))
    own = torch.Generator().manual_seed(seed)
    a, b = torch.empty(down, inner), torch.empty(out, up)
    for t in (a, b):  # A first. Kaiming's bound depends on the length of a row
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(t.shape[1])
        t.uniform_(-bound, bound, generator=own)
    # HF PEFT rounds the pair to the base's dtype.
    rounded = [t.to(like).to(adapter_dtype(like.dtype)) for t in (a, b)]
    return rounded[0], rounded[1]


def own_rows(base: Base, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of `A` and the rows of `B` that fit a place's weight."""
    out, inner = base.weight.shape
    return a if a.shape[1] == inner else a[:, :inner], b if b.shape[0] == out else b[:out]
