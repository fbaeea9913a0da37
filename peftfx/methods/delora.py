"""DeLoRA: a low-rank update whose length is trained separately from its direction (Bini et al. 2025, arXiv:2503.18225).

The update `B diag(l / (r |A_i| |B_i|)) A diag(n)` is added to the weight. Each of the `r` products has length 1 before
the trained scale `l / r`. `n` are the lengths of the weight's columns when the adapter was made; files keep them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import dropped
from peftfx.contract.common.patterns import by_path, pattern_of, refuse_ranks
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.sites.site import Site

A, B, LENGTH, NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_LEAST = 1e-4  #: the least length that is divided by


@dataclass(frozen=True, kw_only=True)
class DeLoRA(WeightMethod):
    """A low-rank update of bounded length, added to linear weights.

    Args:
        r: the rank.
        delora_lambda: the start value of the length.
        module_dropout: dropout on the adapter's input in training.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (delora_only).
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.
        rank_pattern, lambda_pattern: other values of `r` and `delora_lambda` for module paths that match a key.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.DeLoRA(r=8, delora_lambda=15))
    """

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict)

    peft_type: ClassVar[str] = "DELORA"
    # Fused projections are adapted whole: the columns' lengths are those of the whole weight.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_ranks(self.r, self.rank_pattern, "DeLoRA")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def dropout_option(self) -> str:
        return "module_dropout"

    def at(self, site: Site) -> DeLoRA:
        r = int(by_path(self.rank_pattern, "rank_pattern", site.path, self.r))
        length = by_path(self.lambda_pattern, "lambda_pattern", site.path, self.delora_lambda)
        return dataclasses.replace(self, r=r, delora_lambda=length, rank_pattern={}, lambda_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> DeLoRA:
        ranks = pattern_of(methods, "r", self.r)
        lengths = pattern_of(methods, "delora_lambda", self.delora_lambda)
        return dataclasses.replace(self, rank_pattern=ranks, lambda_pattern=lengths)

    def frozen(self) -> frozenset[str]:
        return frozenset({NORMS})

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in (A, B, LENGTH, NORMS)}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        (out, inner), dtype = base.weight.shape, adapter_dtype(base.weight.dtype)
        a, b = (base.weight.new_empty(shape, dtype=dtype) for shape in ((self.r, inner), (out, self.r)))
        for t in (a, b):
            t.uniform_(-1, 1, generator=rng).mul_(t.shape[1] ** -0.5)
        if self.init_weights:
            b.zero_()
        norms = base.weight.detach().norm(dim=0).to(dtype)
        return {A: a, B: b, LENGTH: a.new_full((1,), float(self.delora_lambda)), NORMS: norms}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        given = dropped(x, self.module_dropout, training).to(p[A].dtype)
        return (y + F.linear(F.linear(given * p[NORMS], p[A]) * self._scales(p), p[B])).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        return Update(a=p[A] * p[NORMS], b=p[B] * self._scales(p))

    def _scales(self, p: Params) -> Tensor:
        """Return the factors that give each product the length `l / r`."""
        lengths = p[A].norm(dim=1).clamp_min(_LEAST) * p[B].norm(dim=0).clamp_min(_LEAST)
        return p[LENGTH] / self.r / lengths
