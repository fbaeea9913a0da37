"""PVeRA: VeRA with a distribution in place of its hidden vector (arXiv:2512.07703).

The shared random pair is `A` [2 r, inputs] and `B` [outputs, r]. `d * A(x)` is a mean and the logarithm of a variance.
Training draws from this distribution. Otherwise the mean is used: `y + b * B(d * A(x))` with the first half of `d` and
`A`.
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

A, B, D, SCALE = "pvera_A", "pvera_B", "pvera_lambda_d", "pvera_lambda_b"


@dataclass(frozen=True, kw_only=True)
class PVeRA(RandomBasesMethod):
    """Vectors around a random low-rank pair that all targeted linear layers share; noise in training.

    HF PEFT's `sample_at_inference` and `generator_seed` are left out, because a graph's outputs cannot be random.

    Args:
        pvera_dropout: dropout on the adapter's input in training.
        d_initial: the start value of `d`; `b` starts at 0. Without `init_weights`, `d` is random and `b` is 1.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (pvera_only).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.PVeRA(r=64))
    """

    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: Literal["none", "all", "pvera_only"] = "none"

    peft_type: ClassVar[str] = "PVERA"
    bases: ClassVar[tuple[str, str]] = (A, B)
    vectors: ClassVar[tuple[str, str]] = (D, SCALE)

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        a, b = random_pair(sites, 2 * self.r, self.r, self.projection_prng_key, like)
        return {A: a, B: b}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        new = base.weight.new_ones(base.weight.shape[0], dtype=adapter_dtype(base.weight.dtype))
        d = new.new_full((2 * self.r,), self.d_initial)
        return {SCALE: new.zero_(), D: d} if self.init_weights else {SCALE: new, D: d.normal_(generator=rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        a, b = own_rows(base, p[A], p[B])
        if training:
            mean, log_variance = (p[D] * F.linear(dropped(x, self.pvera_dropout, True).to(a.dtype), a)).chunk(2, -1)
            std = torch.exp(0.5 * log_variance)
            hidden = mean + torch.randn_like(std) * std
        else:
            hidden = p[D][: self.r] * F.linear(x.to(a.dtype), a[: self.r])
        return (y + p[SCALE] * F.linear(hidden, b)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        a, b = own_rows(base, p[A], p[B])
        return Update(a=a[: self.r] * p[D][: self.r, None], b=b * p[SCALE][:, None])
