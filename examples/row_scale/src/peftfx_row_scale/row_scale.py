"""RowScale: a learned factor for each output row of a linear layer, `y = l * (W x + b)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.method import Base, Op, Params, Rows, WeightMethod, adapter_dtype
from peftfx.sites import Site
from peftfx.vectors import row_index


@dataclass(frozen=True, kw_only=True)
class RowScale(WeightMethod):
    """A learned factor for each output row of a linear weight, `y = l * (W x + b)`."""

    peft_type: ClassVar[str] = "ROW_SCALE"
    default_target: ClassVar[str] = "attention.value | mlp.up"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"scale": torch.ones_like(base.weight[:, 0], dtype=adapter_dtype(base.weight.dtype))}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return (y * p["scale"]).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        bias = None if base.bias is None else base.bias * p["scale"]
        return Base(base.weight * p["scale"][:, None], bias)

    def keys(self, site: Site) -> dict[str, str]:
        return {"scale": "row_scale"}

    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[RowScale, dict[str, Tensor]]:
        scale = torch.ones_like(base.weight[:, 0], dtype=adapter_dtype(base.weight.dtype))
        for rows, p in parts.items():
            scale[row_index(rows)] = p["scale"].detach().to(scale.dtype)
        return self, {"scale": scale}
