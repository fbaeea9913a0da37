"""PVeRA: VeRA with a distribution in the place of its hidden vector (arXiv:2512.07703).

The shared random pair is `A` [2 r, inputs] and `B` [outputs, r]. `d * A(x)` is a mean and the logarithm of a variance:
training draws from it, and otherwise the mean is taken, `y + b * B(d * A(x))` with the first half of `d` and `A`.
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
from peftfx.contract.common.random_pair import own_rows, random_pair
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

A, B, D, SCALE = "pvera_A", "pvera_B", "pvera_lambda_d", "pvera_lambda_b"


@dataclass(frozen=True, kw_only=True)
class PVeRA(WeightMethod):
    """Vectors around a random low-rank pair that all targeted linear layers share; noise in training.

    HF PEFT's `sample_at_inference` and `generator_seed` are not here: an output that is drawn is no output of a graph.

    Args:
        r: rank of the pair.
        projection_prng_key: the seed that it is drawn from.
        save_projection: keep it in the files; else it is drawn anew on loading.
        pvera_dropout: dropout on the adapter's input in training.
        d_initial: what `d` starts at; `b` starts at 0.
        fan_in_fan_out: how the weight is stored; read from the graph, kept for HF PEFT's sake.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (pvera_only).
        init_weights: start as the identity; otherwise `d` is random and `b` is 1.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "pvera_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "PVERA"
    # Fused projections as wholes: HF PEFT's files, which know no parts, have no pair for the rows of one.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise PeftfxError(f"the rank must be 1 or more, not {self.r}", "r", "PVeRA(r=256)")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def frozen(self) -> frozenset[str]:
        return frozenset({A, B})

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        a, b = random_pair(sites, 2 * self.r, self.r, self.projection_prng_key, like)
        return {A: a, B: b}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {name: f"base_model.{name}" for name in (A, B)} if self.save_projection else {}

    def keys(self, site: Site) -> dict[str, str]:
        return {D: D, SCALE: SCALE}

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
