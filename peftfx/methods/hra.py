"""HRA: a chain of trained reflections before a linear layer (Yuan et al. 2024, arXiv:2405.17484).

The weight is `W H`, with `H` the product of `r` Householder reflections `I - 2 u u^T`. With `apply_GS` the vectors are
made orthonormal first. `forward` reflects the input: `op(H x, W, b)`. A new adapter has pairs of equal reflections,
which cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

U = "hra_u"


@dataclass(frozen=True, kw_only=True)
class HRA(WeightMethod):
    """Householder reflections of the input of linear layers, and of the patches that a conv reads.

    Args:
        r: the number of reflections; an even number starts as the identity.
        apply_GS: whether the vectors are made orthonormal (Gram-Schmidt). Equal vectors cannot be, so a new adapter
            then starts at random; HF PEFT starts from what rounding leaves of them.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (hra_only).
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.HRA(r=8))
    """

    r: int = 8
    apply_GS: bool = False
    bias: Literal["none", "all", "hra_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "HRA"
    # A reflection of the input acts on all rows: fused projections are adapted whole.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r")

    @property
    def neutral(self) -> bool:
        return self.init_weights and self.r % 2 == 0 and not self.apply_GS

    @property
    def reruns(self) -> bool:
        return True

    def keys(self, site: Site) -> dict[str, str]:
        return {U: U}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        if site.groups > 1:
            raise PeftfxError("HRA does not act on convs of several groups", site.path, "exclude this module")
        count = self.r // 2 if self.neutral else self.r  # equal vectors cannot be made orthonormal
        half = base.weight.new_empty(base.weight[0].numel(), count, dtype=adapter_dtype(base.weight.dtype))
        half.uniform_(-1, 1, generator=rng).mul_(count**-0.5)
        return {U: half.repeat_interleave(self.r // count, 1)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        if site.kind == "conv":
            like = x if y is None else y  # `y` is None where nothing else reads it: see `reruns`
            dtype = p[U].dtype
            wide = Base(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))
            return op(x.to(dtype), *self.fold(site, wide, p)).to(like.dtype)
        reflected = x.to(p[U].dtype)
        for u in reversed(self._vectors(p)):
            reflected = reflected - 2 * (reflected @ u)[..., None] * u
        return op(reflected.to(x.dtype), base.weight, base.bias)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        weight = base.weight.flatten(1)
        for u in self._vectors(p):
            weight = weight - 2 * torch.outer(weight @ u, u)
        return Base(weight.view(base.weight.shape), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        """Return `W H - W`, of rank `r`: each reflection adds a column of the weight so far, and a vector."""
        weight, columns, vectors = base.weight.float().flatten(1), [], self._vectors({U: p[U].float()})
        for u in vectors:
            columns.append(-2 * (weight @ u))
            weight = weight + torch.outer(columns[-1], u)
        return Update(a=torch.stack(vectors).view(-1, *base.weight.shape[1:]), b=torch.stack(columns, 1))

    def _vectors(self, p: Params) -> list[Tensor]:
        """Return the unit vectors of the reflections, in the order in which they are applied to the weight."""
        found: list[Tensor] = []
        for u in p[U].unbind(1):
            for other in found if self.apply_GS else ():
                u = u - (other @ u) * other
            found.append(u / u.norm())
        return found
