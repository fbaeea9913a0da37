"""LoHa: the elementwise product of two low-rank products (Hyeon-Woo et al. 2021, arXiv:2108.06098).

The update `s (W1a W1b) * (W2a W2b)`, with `s = alpha / r`, is added to the weight. It has rank `r^2`, which is also its
rank in graphs with slots. A conv's kernel is flattened, or, with `use_effective_conv2d`, computed from a core
[r, r, *kernel].
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import LycorisMethod, dropped_rows
from peftfx.contract.method import Base, Params
from peftfx.contract.update import Update
from peftfx.sites.site import Site

W1A, W1B, W2A, W2B, T1, T2 = (f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))


@dataclass(frozen=True, kw_only=True)
class LoHa(LycorisMethod):
    """The elementwise (Hadamard) product of two low-rank products, added to linear and conv weights.

    Args:
        r: the rank of each product.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.LoHa(r=4, alpha=8))
    """

    init_weights: bool = True

    peft_type: ClassVar[str] = "LOHA"

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def _cores(self, site: Site) -> bool:
        """Return whether the update of this conv has a core of the kernel's size."""
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
        return dropped_rows(self.delta(site, weight, p), self.rank_dropout)

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        if T1 in p:
            pairs = ((p[T1], p[W1A], p[W1B]), (p[T2], p[W2A], p[W2B]))
            one, other = (torch.einsum("ijkl,ip,jq->pqkl", t, a, b) for t, a, b in pairs)
        else:
            one, other = p[W1A] @ p[W1B], p[W2A] @ p[W2B]
        return self.of_weight(site, weight, one * other)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        self.refuse_conv_update(site)
        q = {name: t.float() for name, t in p.items()}
        a = (q[W1B][:, None] * q[W2B][None]).flatten(0, 1)
        b = (q[W1A][:, :, None] * q[W2A][:, None]).flatten(1)
        return Update(a=a, b=b * self.scaling)
