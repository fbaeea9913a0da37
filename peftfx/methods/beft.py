"""BEFT: a trained bias in addition to the base's own (Huang et al. 2026; HF PEFT's `BeftConfig`).

`forward` is `y + b`. The base's bias is not changed. Merging adds the two, and gives a bias to a layer without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, row_index
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site

_BIAS = "beft_bias"


@dataclass(frozen=True, kw_only=True)
class BEFT(WeightMethod):
    """A bias that is added to the output of linear layers.

    Args:
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.BEFT(target="attention.value"))
    """

    init_weights: bool = True

    peft_type: ClassVar[str] = "BEFT"
    default_target: ClassVar[str] = "attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def keys(self, site: Site) -> dict[str, str]:
        return {_BIAS: _BIAS}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        bias = base.weight.new_zeros((1, base.weight.shape[0]), dtype=adapter_dtype(base.weight.dtype))
        return {_BIAS: bias if self.init_weights else bias.normal_(generator=rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return (y + p[_BIAS].flatten()).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight, self.update(site, base, p).bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        bias = p[_BIAS].flatten()
        return Update(bias=bias if base.bias is None else base.bias + bias)

    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[BEFT, dict[str, Tensor]]:
        bias = torch.zeros_like(base.weight[:1, :1], dtype=torch.float32).repeat(1, base.weight.shape[0])
        for rows, p in parts.items():
            bias[0, row_index(rows)] = p[_BIAS].detach().flatten().to(bias.dtype)
        return self, {_BIAS: bias}
