"""RoAd: rotates and scales outputs in pairs (Liao and Monz 2024, arXiv:2409.00119).

In each group of `group_size` outputs, an output of the first half and one of the second half form a pair `(y1, y2)`.
The pair becomes `(a cos t y1 - b sin u y2, c sin v y1 + d cos w y2)`, with trained angles and scales: one of each for a
pair (`road_1`), two (`road_2`), or four (`road_4`). The bias is rotated too. All rows are mixed: there is no low-rank
update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site

THETA, ALPHA = "road_theta", "road_alpha"
_EACH = {"road_1": 1, "road_2": 2, "road_4": 4}  #: the number of angles, and of scales, of a pair


@dataclass(frozen=True, kw_only=True)
class RoAd(WeightMethod):
    """A rotation and a scale of each pair of outputs of linear layers.

    Args:
        variant: the number of angles and of scales of a pair: `road_1`, `road_2` or `road_4`.
        group_size: the outputs of a group, whose halves are paired; an even divisor of the outputs.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.RoAd(variant="road_1", group_size=32))
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True

    peft_type: ClassVar[str] = "ROAD"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2 or self.group_size % 2:
            what = f"a group is of pairs: an even number, not {self.group_size}"
            raise PeftfxError(what, "group_size", "RoAd(group_size=64)")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def keys(self, site: Site) -> dict[str, str]:
        return {THETA: THETA, ALPHA: ALPHA}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out = len(base.weight)
        if out % self.group_size:
            what = f"groups of {self.group_size} do not divide {out} outputs"
            raise PeftfxError(what, site.path, "group_size=, an even divisor of the outputs")
        theta = base.weight.new_zeros(out // 2 * _EACH[self.variant], dtype=adapter_dtype(base.weight.dtype))
        alpha = torch.ones_like(theta)
        if not self.init_weights:
            theta.normal_(std=0.5, generator=rng)
            alpha.normal_(1, 0.5, generator=rng)
        return {THETA: theta, ALPHA: alpha}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return self._turned(y.to(p[THETA].dtype), p).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        bias = None if base.bias is None else self._turned(base.bias, p)
        return Base(self._turned(base.weight.T, p).T, bias)

    def _turned(self, y: Tensor, p: Params) -> Tensor:
        """Return the outputs times the cosines plus their partners times the sines, along the last dimension."""
        cosines, sines = self._factors(p)
        halves = y.unflatten(-1, (-1, 2, self.group_size // 2))
        partners = torch.stack([-halves[..., 1, :], halves[..., 0, :]], -2).flatten(-3)
        return y * cosines + partners * sines

    def _factors(self, p: Params) -> tuple[Tensor, Tensor]:
        theta, alpha = p[THETA], p[ALPHA]
        if self.variant == "road_1":
            each = (t.view(-1, 1, self.group_size // 2).expand(-1, 2, -1).flatten() for t in (theta, alpha))
            theta, alpha = each
        if self.variant != "road_4":
            return alpha * theta.cos(), alpha * theta.sin()
        # In each group the first half of the parameters is for the output itself, the second half for its partner.
        (stays, comes), (a, b) = (t.view(-1, 2, self.group_size).unbind(1) for t in (theta, alpha))
        return (a * stays.cos()).flatten(), (b * comes.sin()).flatten()

    @torch.no_grad()
    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[RoAd, dict[str, Tensor]]:
        """Return groups with the identity at the rows of no part, if parts start and end between groups."""
        size = self.group_size
        if len(base.weight) % size or any(end % size for rows in parts for part in rows for end in part):
            return super().whole(site, base, parts)
        first = next(iter(parts.values()))[THETA]
        groups = first.new_zeros(len(base.weight) // size, size // 2 * _EACH[self.variant])
        p = {THETA: groups, ALPHA: torch.ones_like(groups)}
        for rows, q in parts.items():
            index = torch.cat([torch.arange(start // size, end // size) for start, end in rows])
            for name, t in p.items():
                t[index] = q[name].view(len(index), -1)
        return self, {name: t.flatten() for name, t in p.items()}
