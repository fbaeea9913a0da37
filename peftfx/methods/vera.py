"""VeRA: one random low-rank pair for all layers, scaled by vectors of each (Kopiczko et al. 2024, arXiv:2310.11454).

`A` [r, inputs] and `B` [outputs, r] are random, frozen and shared by all places of a rule. Each place trains `d` [r]
and `b` [outputs]. `forward` is `y + b * B(d * A(dropout(x)))`. The pair is as large as the largest place, and each
place reads its first rows and columns. The numbers are those that HF PEFT draws from the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import dropped
from peftfx.contract.common.random_bases import RandomBasesMethod, own_rows, random_pair
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.sites.site import Site

A, B, D, SCALE = "vera_A", "vera_B", "vera_lambda_d", "vera_lambda_b"


@dataclass(frozen=True, kw_only=True)
class VeRA(RandomBasesMethod):
    """Trained vectors that scale a random low-rank pair, which all targeted linear layers share.

    Args:
        vera_dropout: dropout on the adapter's input in training.
        d_initial: the start value of `d`; `b` starts at 0. Without `init_weights`, `d` is random and `b` is 1.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (vera_only).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.VeRA(r=64))
    """

    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: Literal["none", "all", "vera_only"] = "none"

    peft_type: ClassVar[str] = "VERA"
    bases: ClassVar[tuple[str, str]] = (A, B)
    vectors: ClassVar[tuple[str, str]] = (D, SCALE)

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        a, b = random_pair(sites, self.r, self.r, self.projection_prng_key, like)
        return {A: a, B: b}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        new = base.weight.new_ones(base.weight.shape[0], dtype=adapter_dtype(base.weight.dtype))
        d = new.new_full((self.r,), self.d_initial)
        return {SCALE: new.zero_(), D: d} if self.init_weights else {SCALE: new, D: d.normal_(generator=rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        a, b = own_rows(base, p[A], p[B])
        given = dropped(x, self.vera_dropout, training).to(p[D].dtype)
        return (y + F.linear(F.linear(given, a) * p[D], b) * p[SCALE]).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        a, b = own_rows(base, p[A], p[B])
        return Update(a=a * p[D][:, None], b=b * p[SCALE][:, None])
