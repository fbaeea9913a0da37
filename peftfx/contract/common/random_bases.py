"""RandomBasesMethod: methods that train vectors around random matrices, which all places of a rule share.

The matrices are drawn from a seed. Their numbers are those that HF PEFT draws from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Base
from peftfx.contract.weight import WeightMethod
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class RandomBasesMethod(WeightMethod):
    """Trained vectors around two random, frozen matrices, which all targeted linear layers share.

    Args:
        r: the rank of the matrices' product.
        projection_prng_key: the seed that the matrices are drawn from.
        save_projection: whether files have the matrices; otherwise they are drawn again on loading.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    fan_in_fan_out: bool = False
    init_weights: bool = True

    bases: ClassVar[tuple[str, str]]
    """The names of the two matrices, here and in files."""
    sized: ClassVar[tuple[tuple[int, ...], ...]] = ((1,), (0,))
    """The dimensions of the two matrices that are as long as the largest layer asks for."""
    vectors: ClassVar[tuple[str, str]]
    """The names of the tensors that each place trains."""
    # Fused projections are adapted whole: HF PEFT's files have no parts, and so no bases for the rows of one part.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def frozen(self) -> frozenset[str]:
        return frozenset(self.bases)

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {name: f"base_model.{name}" for name in self.bases} if self.save_projection else {}

    def sized_by_layers(self) -> Mapping[str, tuple[int, ...]]:
        return dict(zip(self.bases, self.sized, strict=True))

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in self.vectors}

    def changes_nothing(self, saved: Mapping[str, Tensor]) -> bool:
        """Return whether a vector is zero: each update is a product of both vectors, and one starts as zero."""
        return saved.keys() == set(self.vectors) and not all(bool(t.any()) for t in saved.values())


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
