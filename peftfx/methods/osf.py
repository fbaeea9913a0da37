"""OSF: trains the weight's smallest singular values and vectors (Nayak et al. 2025, arXiv:2504.07097).

With `W = U S V`, the largest `effective_rank` singular values are kept, and the factors `U S V` of the others are
trained. Gradients leave out the directions of the kept part. The update is the trained product minus the product at the
start, so it has twice the factors' rank. Files do not have the product at the start: it is found again in the base's
weight.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.patterns import compiled
from peftfx.sites.site import Site

U, S, V = "U_low", "S_low", "V_low"
U_START, V_START, U_HIGH, V_HIGH = "U_low_start", "V_low_start", "U_high", "V_high"


@dataclass(frozen=True, kw_only=True)
class OSF(WeightMethod):
    """The smallest singular values and vectors of linear weights, trained.

    Args:
        effective_rank: how many of the largest singular values are kept, or a fraction of all; by default half.
        rank_pattern: another `effective_rank` for module paths that contain a key.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.OSF(effective_rank=0.5))
    """

    effective_rank: int | float | None = None
    rank_pattern: Mapping[str, float] | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "OSF"
    # Fused projections are adapted whole: singular values belong to the whole weight.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False
    ignored: ClassVar[frozenset[str]] = frozenset({"target_svd_config"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and rank <= 0:
                what = f"the rank must be 1 or more, or a fraction above 0, not {rank}"
                raise PeftfxError(what, "effective_rank, rank_pattern", "OSF(effective_rank=0.5)")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def at(self, site: Site) -> OSF:
        patterns = (self.rank_pattern or {}).items()
        found = (rank for key, rank in patterns if compiled(key, "rank_pattern", r".*(?:{}).*").fullmatch(site.path))
        return dataclasses.replace(self, effective_rank=next(found, self.effective_rank), rank_pattern=None)

    def gather(self, methods: Mapping[str, Method]) -> OSF:
        others = {
            f"^{re.escape(path)}$": m.effective_rank
            for path, m in methods.items()
            if isinstance(m, OSF) and m.effective_rank is not None and m.effective_rank != self.effective_rank
        }
        return dataclasses.replace(self, rank_pattern=others or None)

    def frozen(self) -> frozenset[str]:
        return frozenset({U_START, V_START, U_HIGH, V_HIGH})

    def keys(self, site: Site) -> dict[str, str]:
        return {name: f"osf_svd_params.{name}" for name in (U, S, V)}

    def _kept(self, site: Site, least: int) -> int:
        rank = self.effective_rank
        if rank is None:
            count = least // 2
        else:
            count = min(least, int(least * rank) if isinstance(rank, float) and rank <= 1 else int(rank))
        if not 0 < count < least:
            what = f"{count} of {least} singular values are kept: keep at least 1, and leave at least 1 to train"
            raise PeftfxError(what, site.path, f"effective_rank=, from 1 to {least - 1}")
        return count

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        kept, dtype = self._kept(site, min(base.weight.shape)), adapter_dtype(base.weight.dtype)
        u, s, v = (t.to(dtype) for t in torch.linalg.svd(base.weight.detach().float(), full_matrices=False))
        trained = {U: u[:, kept:], S: s[kept:], V: v[kept:]}
        start = {U_START: u[:, kept:] * s[kept:], V_START: v[kept:], U_HIGH: u[:, :kept], V_HIGH: v[:kept]}
        p = {name: t.clone(memory_format=torch.contiguous_format) for name, t in (trained | start).items()}
        for name in () if self.init_weights else trained:
            p[name].normal_(generator=rng)
        return p

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        u, v = p[U], p[V]
        u, v = _steered(u, p[U_HIGH] @ (p[U_HIGH].T @ u)), _steered(v, (v @ p[V_HIGH].T) @ p[V_HIGH])
        read = x.to(v.dtype)
        start = F.linear(F.linear(read, p[V_START]), p[U_START])  # separate, as it gets no gradients
        return y + (F.linear(F.linear(read, v), u * p[S]) - start).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        return Update(a=torch.cat([p[V], p[V_START]]), b=torch.cat([p[U] * p[S], -p[U_START]], 1))


def _steered(value: Tensor, kept: Tensor) -> Tensor:
    """Return `value`, with a gradient only through `value - kept`: without the directions of the kept part."""
    return value - kept + kept.detach()
