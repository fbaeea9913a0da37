"""LoHa: the product, element by element, of two low-rank products (Hyeon-Woo et al. 2021, arXiv:2108.06098).

`s (W1a W1b) * (W2a W2b)` with `s = alpha / r` is added to the weight. It is of rank `r^2`, and told so where an adapter
is put into a graph. A conv's kernel is flattened, or, with `use_effective_conv2d`, made of a core [r, r, *kernel].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import DeltaMethod, dropped_rows, kept
from peftfx.contract.common.low_rank import dense
from peftfx.contract.common.patterns import by_path, pattern_of
from peftfx.contract.method import Base, Method, Params
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

W1A, W1B, W2A, W2B, T1, T2 = (f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))


@dataclass(frozen=True, kw_only=True)
class LoHa(DeltaMethod):
    """The Hadamard product of two low-rank products, added to linear and conv weights.

    Args:
        r: rank of each product.
        alpha: numerator of the scale.
        rank_dropout: the share of the update's rows that training leaves out.
        module_dropout: how often training leaves all of it out.
        use_effective_conv2d: give a conv a core of its kernel's size, and factors for its channels.
        rank_pattern, alpha_pattern: other `r` and `alpha` for module paths that match a key.
        init_weights: start as the identity; otherwise at random.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_weights: bool = True

    peft_type: ClassVar[str] = "LOHA"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or any(r < 1 for r in self.rank_pattern.values()):
            raise PeftfxError(f"the rank must be 1 or more, not {self.r}", "r", "LoHa(r=8)")
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                what = f"it must be a probability below 1, not {getattr(self, name)}"
                raise PeftfxError(what, name, f"LoHa({name}=0.1)")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def dropout(self) -> float:
        return max(self.rank_dropout, self.module_dropout)

    def at(self, site: Site) -> LoHa:
        r = int(by_path(self.rank_pattern, "rank_pattern", site.path, self.r))
        alpha = by_path(self.alpha_pattern, "alpha_pattern", site.path, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> LoHa:
        ranks, alphas = pattern_of(methods, "r", self.r), pattern_of(methods, "alpha", self.alpha)
        return dataclasses.replace(self, rank_pattern=ranks, alpha_pattern=alphas)

    def _cores(self, site: Site) -> bool:
        """Whether the update of this conv has a core of the kernel's size."""
        kernel = site.shape[2:]
        return site.kind == "conv" and self.use_effective_conv2d and math.prod(kernel) > 1 and len(kernel) < 3

    def keys(self, site: Site) -> dict[str, str]:
        names = (W1A, W1B, W2A, W2B, *((T1, T2) if self._cores(site) else ()))
        return {name: name for name in names}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        new = functools.partial(torch.empty, dtype=adapter_dtype(base.weight.dtype), device=base.weight.device)
        r, (out, inner, *kernel) = self.r, base.weight.shape
        if self._cores(site):
            core = (r, r, *kernel, *(1,) * (2 - len(kernel)))
            sizes = {W1A: (r, out), W1B: (r, inner), W2A: (r, out), W2B: (r, inner), T1: core, T2: core}
        else:
            inner = base.weight[0].numel()
            sizes = {W1A: (out, r), W1B: (r, inner), W2A: (out, r), W2B: (r, inner)}
        p = {name: new(size) for name, size in sizes.items()}
        for name, t in p.items():
            if name == W2B and self.init_weights:
                t.zero_()
            else:
                t.uniform_(-1, 1, generator=rng).mul_(1 / math.sqrt(t[0].numel()))
        return p

    def trained_delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        delta = self.delta(site, weight, {**p, W1A: p[W1A] * kept(p[W1A], self.module_dropout)})
        return dropped_rows(delta, self.rank_dropout)

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        if T1 in p:
            pairs = ((p[T1], p[W1A], p[W1B]), (p[T2], p[W2A], p[W2B]))
            one, other = (torch.einsum("ijkl,ip,jq->pqkl", t, a, b) for t, a, b in pairs)
        else:
            one, other = p[W1A] @ p[W1B], p[W2A] @ p[W2B]
        shape = (*weight.shape[:1], -1, *site.shape[2:]) if site.kind == "conv" else weight.shape
        delta = (one * other * (self.alpha / self.r)).reshape(shape)
        if delta.shape[1] == weight.shape[1]:
            return delta
        return dense(delta, site.groups)  # another adapter has made the grouped conv dense

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if site.kind != "linear":
            raise PeftfxError("LoHa on a conv cannot be put into a running graph", site.path, "export it merged")
        q = {name: t.float() for name, t in p.items()}
        a = (q[W1B][:, None] * q[W2B][None]).flatten(0, 1)
        b = (q[W1A][:, :, None] * q[W2A][:, None]).flatten(1)
        return Update(a=a, b=b * (self.alpha / self.r))
