"""LoKr: the Kronecker product of a small matrix and a low-rank matrix (Yeh et al. 2023, arXiv:2309.14859).

The update `s (W1 x W2)`, with `s = alpha / r`, is added to the weight. The numbers of outputs and of inputs are each
the product of two sizes. A factor of the Kronecker product is itself a product `A B` if `r` is smaller than half its
size. The rank of the update is the product of the factors' ranks. If it is smaller than the weight's rank, a graph with
slots can take the update.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import LycorisMethod, dropped_rows
from peftfx.contract.method import Base, Params
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

W1, W1A, W1B, W2, W2A, W2B, T2 = (f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))


@dataclass(frozen=True, kw_only=True)
class LoKr(LycorisMethod):
    """A Kronecker product added to linear and conv weights.

    Args:
        r: the rank of a factor that is itself a product.
        rank_dropout_scale: whether the rows that are not dropped are scaled up to compensate.
        use_effective_conv2d: give a conv's second factor a core of its kernel's size.
        decompose_both: whether the first factor may be a product too.
        decompose_factor: the first of the two sizes, where it divides; -1 takes sizes near the square root.
        init_weights: True starts as the identity by a zero first factor, "lycoris" by a zero second factor; False
            starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.LoKr(r=4, alpha=8, decompose_factor=8))
    """

    rank_dropout_scale: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    init_weights: bool | Literal["lycoris"] = True

    peft_type: ClassVar[str] = "LOKR"
    by_size: ClassVar[frozenset[str]] = frozenset({W1, W1A, W1B, W2, W2A, W2B, T2})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            what = f"decompose_factor must be 1 or more, or -1 for the square root, not {self.decompose_factor}"
            raise PeftfxError(what, "decompose_factor", "LoKr(decompose_factor=-1)")

    @property
    def neutral(self) -> bool:
        return bool(self.init_weights)

    def _sizes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter. A factor cut in two has `r` columns; a core has the kernel's size."""
        shape = site.shape[::-1] if site.transposed else site.shape
        (out, inner, *kernel), r = shape, self.r
        (a, c), (b, d) = (lycoris_factors(size, self.decompose_factor) for size in (out, inner))
        halves = self.decompose_both and r < max(a, b) / 2
        one = {W1A: (a, r), W1B: (r, b)} if halves else {W1: (a, b)}
        if r >= max(c, d) / 2:
            return {**one, W2: (c, d, *kernel)}
        if self.use_effective_conv2d and math.prod(kernel) > 1:
            return {**one, T2: (r, r, *kernel, *(1,) * (2 - len(kernel))), W2A: (r, c), W2B: (r, d)}
        return {**one, W2A: (c, r), W2B: (r, d * math.prod(kernel))}

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in self._sizes(site)}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        if len(site.shape) > 4:
            raise PeftfxError("LoKr does not act on convs of 3 dimensions", site.path, "exclude this module")
        new = functools.partial(torch.empty, dtype=adapter_dtype(base.weight.dtype), device=base.weight.device)
        p = {name: new(size) for name, size in self._sizes(site).items()}
        zero = (W2, W2B) if self.init_weights == "lycoris" else (W1, W1A) if self.init_weights else ()
        for name, t in p.items():
            if name in zero:
                t.zero_()
            else:
                t.uniform_(-1, 1, generator=rng).mul_(t[0].numel() ** -0.5)
        return p

    def trained_delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        return dropped_rows(self.delta(site, weight, p), self.rank_dropout, rescaled=self.rank_dropout_scale)

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        one = p[W1] if W1 in p else p[W1A] @ p[W1B]
        if T2 in p:
            other = torch.einsum("ijkl,ip,jr->prkl", p[T2], p[W2A], p[W2B])
        else:
            other = p[W2] if W2 in p else p[W2A] @ p[W2B]
        if other.ndim == 4:
            one = one[:, :, None, None]
        # HF PEFT's product for a 1-d conv does not expand the first factor: it is [1, a, b] by [c, d, kernel].
        return self.of_weight(site, weight, torch.kron(one, other.contiguous()))

    def update(self, site: Site, base: Base, p: Params) -> Update:
        self.refuse_conv_update(site)
        q = {name: t.float() for name, t in p.items()}
        one = _halves(q[W1]) if W1 in q else (q[W1A], q[W1B])
        other = _halves(q[W2]) if W2 in q else (q[W2A], q[W2B])
        b, a = (torch.kron(*pair) for pair in zip(one, other, strict=True))
        if len(a) >= min(base.weight.shape):
            what = f"this Kronecker product is of rank {len(a)}, which is the weight's own: there is no low-rank sum"
            raise PeftfxError(what, site.path, "export the adapter merged; or a smaller r, with decompose_both")
        return Update(a=a, b=b * self.scaling)


def _halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix as the product of an identity and itself, with its smaller size between."""
    rows, columns = weight.shape
    eye = torch.eye(min(rows, columns), dtype=weight.dtype, device=weight.device)
    return (eye, weight) if rows <= columns else (weight, eye)


def lycoris_factors(size: int, near: int) -> tuple[int, int]:
    """Return LyCORIS's two factors of a size, the smaller first, near `near`, or near the square root (-1)."""
    if near > 0 and size % near == 0:
        return near, size // near
    most = size if near == -1 else near
    m, n = 1, size
    for new in range(2, most + 1):
        if size % new == 0:
            if m >= n or new + size // new > m + n:
                break
            m, n = new, size // new
    return min(m, n), max(m, n)
