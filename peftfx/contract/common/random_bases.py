"""RandomBasesMethod: vectors around random matrices that all places of a rule read; and a low-rank pair of such.

They are drawn from a seed as HF PEFT draws them, number for number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Base
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class RandomBasesMethod(WeightMethod):
    """Trained vectors around two random, frozen matrices that all targeted linear layers share.

    Args:
        r: rank of what the matrices make.
        projection_prng_key: the seed that they are drawn from.
        save_projection: keep them in the files; else they are drawn anew on loading.
        fan_in_fan_out: how the weight is stored; read from the graph, kept for HF PEFT's sake.
        init_weights: start as the identity; otherwise at random.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    fan_in_fan_out: bool = False
    init_weights: bool = True

    bases: ClassVar[tuple[str, str]]
    """The names of the two, here and in files."""
    vectors: ClassVar[tuple[str, str]]
    """The names of what each place trains."""
    # Fused projections as wholes: HF PEFT's files, which know no parts, have no bases for the rows of one.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            name = type(self).__name__
            raise PeftfxError(f"the rank must be 1 or more, not {self.r}", "r", f"{name}(r={type(self).r})")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def frozen(self) -> frozenset[str]:
        return frozenset(self.bases)

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {name: f"base_model.{name}" for name in self.bases} if self.save_projection else {}

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in self.vectors}


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
