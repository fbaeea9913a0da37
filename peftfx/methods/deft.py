"""DEFT: removes one part of the weight, and puts in another (HF PEFT's `DeftConfig`).

The weight is `W' = W - Q K^T W + s Q R`, with `P` [out, r] trained: `Q = P` and `K = relu(P)`, or both are the
orthonormal factor of `P`. `R` [r, in] is trained too, and starts as the removed part. With `para` nothing is put in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, row_index
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.delta import dropped
from peftfx.contract.common.householder import orthonormal
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site

P, R = "deft_P", "deft_R"


@dataclass(frozen=True, kw_only=True)
class DEFT(WeightMethod):
    """A replaced projection of the weight's rows.

    Args:
        r: the rank of the replaced part; at most the number of outputs.
        decomposition_method: `relu` or `qr`, how the two factors are made from `P`.
        init_scale: the scale of a random `R`, in units of 0.02.
        alpha: the numerator of the scale `alpha / r`; without it the scale is 1.
        para: only remove the part, and put nothing in.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        deft_dropout: dropout on the input of the new part, in training.
        init_weights: whether a new adapter starts as the identity, unless `para`; otherwise `R` is random.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (deft_only).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.DEFT(r=8, target="attention.query"))
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: Literal["none", "all", "deft_only"] = "none"

    peft_type: ClassVar[str] = "DEFT"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r")

    @property
    def neutral(self) -> bool:
        return self.init_weights and not self.para

    def keys(self, site: Site) -> dict[str, str]:
        return {P: P} if self.para else {P: P, R: R}

    def _scale(self, rank: int) -> float:
        return self.alpha / rank if self.alpha else 1.0

    def _factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """Return the factor of the new part and the factor of the removed part, both [out, r]."""
        if self.decomposition_method == "relu":
            return p[P], torch.relu(p[P])
        q = orthonormal(p[P])
        return q, q

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, inner = base.weight.shape
        made = base.weight.new_empty(out, min(self.r, out), dtype=adapter_dtype(base.weight.dtype))
        p = {P: made.normal_(std=0.02, generator=rng)}
        if self.para:
            return p
        if not self.init_weights:
            return {**p, R: made.new_empty(made.shape[1], inner).normal_(std=0.02 * self.init_scale, generator=rng)}
        taken = self._factors({P: made.float()})[1].T @ base.weight.float()
        return {**p, R: (taken / self._scale(made.shape[1])).to(made.dtype)}

    @property
    def replaces(self) -> bool:
        return True

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        put, taken = self._factors(p)
        plain = op(x, *base)  # what is removed is the base's own part, also where other methods act
        product = plain.to(put.dtype)
        product = product if base.bias is None else product - base.bias.to(put.dtype)
        change = -(product @ taken)
        if not self.para:
            read = dropped(x.to(put.dtype), self.deft_dropout, training)
            change = change + F.linear(read, p[R] * self._scale(put.shape[1]))
        return ((plain if y is None else y).to(put.dtype) + change @ put.T).to(plain.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return self.fold_over(site, base, base, p)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods. As in `forward`, the removed part is of the base's weight."""
        return Base(self.update(site, base, p).apply(under.weight), under.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        put, taken = self._factors(p)
        a = -(taken.T @ base.weight.to(put.dtype))
        return Update(a=a if self.para else a + p[R] * self._scale(put.shape[1]), b=put)

    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[DEFT, dict[str, Tensor]]:
        ranks = [p[P].shape[1] for p in parts.values()]
        wide = torch.zeros(base.weight.shape[0], sum(ranks), dtype=torch.float32, device=base.weight.device)
        own = torch.zeros_like(wide)
        for i, (rows, p) in enumerate(parts.items()):
            columns = slice(sum(ranks[:i]), sum(ranks[: i + 1]))
            wide[row_index(rows), columns] = p[P].detach().float()
            own[row_index(rows), columns] = self._factors({P: p[P].detach().float()})[0]
        method = dataclasses.replace(self, r=sum(ranks))
        if self.para:
            return method, {P: wide}
        r = torch.cat([p[R].detach().float() * self._scale(p[P].shape[1]) for p in parts.values()])
        if self.decomposition_method == "qr":  # the columns equal those of the parts, except for signs
            r = torch.sign((orthonormal(wide) * own).sum(0))[:, None] * r
        return method, {P: wide, R: r / method._scale(sum(ranks))}
