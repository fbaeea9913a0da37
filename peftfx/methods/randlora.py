"""RandLoRA: a sum of random low-rank products with trained diagonals (Albert et al. 2025, arXiv:2502.00987).

The update `s sum_j B_j diag(l_j) A diag(g_j)` is added to the weight. `A` and all `B_j` are random, frozen, and shared
by all places of a rule. There are so many `B_j` that the sum has the weight's full rank: there is no low-rank update.
The random bases are as large as the largest place, and each place reads their first rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import dropped
from peftfx.contract.common.random_bases import RandomBasesMethod
from peftfx.contract.method import Base, Op, Params
from peftfx.sites.site import Site

A, B, LAMBDA, GAMMA = "randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"


@dataclass(frozen=True, kw_only=True)
class RandLoRA(RandomBasesMethod):
    """Trained diagonals around random bases that all targeted linear layers share.

    Args:
        r: the rank of each base. With a smaller rank there are more bases, and more trained numbers.
        randlora_alpha: the numerator of the scale, `randlora_alpha / r`.
        sparse, very_sparse: whether the bases have only the numbers -1, 0 and 1.
        randlora_dropout: dropout on the adapter's input in training.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (randlora_only).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.RandLoRA(r=16))
    """

    r: int = 32
    randlora_alpha: float = 640
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    bias: Literal["none", "all", "randlora_only"] = "none"

    peft_type: ClassVar[str] = "RANDLORA"
    bases: ClassVar[tuple[str, str]] = (A, B)
    sized: ClassVar[tuple[tuple[int, ...], ...]] = ((2,), (0, 1))
    vectors: ClassVar[tuple[str, str]] = (LAMBDA, GAMMA)

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        shapes = [site.shape[::-1] if site.transposed else site.shape for site in sites]
        sizes = [max(side) for side in zip(*shapes, strict=True)]
        least, most, own = min(sizes), max(sizes), torch.Generator().manual_seed(self.projection_prng_key)
        count = -(-least // self.r)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (math.sqrt(least) if self.very_sparse else 3))
            drawn = (torch.rand(shape, generator=own) for shape in ((self.r, 1, least), (most, count, self.r)))
            a, b = ((t > 1 - share).float() - (t < share).float() for t in drawn)
        else:
            a = _kaiming((self.r, 1, least), own)
            b = torch.cat([_kaiming((most, 1, self.r), own) for _ in range(count)], 1)
        # HF PEFT rounds the bases to the base model's dtype.
        return {name: (t / t.std()).to(like).to(adapter_dtype(like.dtype)) for name, t in ((A, a), (B, b))}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        least, most = sorted(base.weight.shape)
        count = -(-least // self.r)
        scale = base.weight.new_zeros(self.r, count, dtype=adapter_dtype(base.weight.dtype))
        if self.init_weights:
            return {LAMBDA: scale, GAMMA: scale.new_full((count, least), 1 / max(count, least))}
        return {LAMBDA: scale.normal_(generator=rng), GAMMA: scale.new_full((count, least), 1 / most)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        a, b = self._factors(base, p)
        given = dropped(x.to(a.dtype), self.randlora_dropout, training)
        return (y + F.linear(F.linear(given, a), b) * (self.randlora_alpha / self.r)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        a, b = self._factors(base, p)
        return Base(base.weight + b @ a * (self.randlora_alpha / self.r), base.bias)

    def _factors(self, base: Base, p: Params) -> tuple[Tensor, Tensor]:
        """Return `A` [bases * r, in] and `B` [out, bases * r]. The trained parts are on the smaller side."""
        out, inner = base.weight.shape
        least, most, count = min(out, inner), max(out, inner), p[LAMBDA].shape[1]
        small = (p[LAMBDA][:, :, None] * p[A][:, :, :least] * p[GAMMA]).flatten(0, 1)
        large = p[B][:most, :count].flatten(1)
        return (small, large) if least == inner else (large.T, small.T)


def _kaiming(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Draw Kaiming's uniform numbers in bfloat16, as HF PEFT does."""
    bound = math.sqrt(3) * math.sqrt(1 / 3) / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=rng)
