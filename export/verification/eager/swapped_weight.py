"""A module's adapted weight, which replaces the base's weight for a while."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftfx.contract.broadcast import row_index
from peftfx.contract.method import Base, Params
from peftfx.contract.placement import WeightPlacement
from peftfx.contract.weight import widened
from peftfx.export.verification.eager.published import on_weight
from peftfx.sites.blocks import turned
from peftfx.sites.site import EXPERTS

HeldTensors = MutableMapping[str, Any]
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class AdapterStep:
    """The step of one adapter at a module: its placement and parameters."""

    placement: WeightPlacement
    params: Params


@dataclass
class SwappedWeight:
    """A module's weight after these adapter steps, which can replace the base's weight."""

    module: nn.Module
    name: str
    kind: str
    transposed: bool
    steps: Sequence[AdapterStep]
    before: list[Callable[[], object]] = field(default_factory=list)

    def put(self) -> None:
        """Replace the base's weight by the adapted weight."""
        held = self.module._parameters
        weight, bias = held[self.name], held.get("bias") if self.name == "weight" else None
        assert weight is not None
        base = Base(turned(weight, self.transposed).float(), None if bias is None else bias.float())
        groups = self.module.groups if isinstance(self.module, CONV) else 1
        groups = len(weight) if self.kind == EXPERTS else groups
        start = base
        for step in self.steps:
            base = _changed(start, base, step, self.kind, groups)
        new = turned(base.weight, self.transposed).to(weight.dtype)
        self._set(held, self.name, new)
        if base.bias is not None:
            self._set(held, "bias", base.bias.to(weight.dtype))
        if isinstance(self.module, CONV) and new.shape != weight.shape:  # now a conv of one group
            self._set(self.module.__dict__, "groups", 1)

    def _set(self, held: HeldTensors, name: str, value: object) -> None:
        old = held[name]
        self.before.append(lambda: held.__setitem__(name, old))
        held[name] = value

    def back(self) -> None:
        """Restore the base's weight."""
        while self.before:
            self.before.pop()()


@torch.no_grad()
def _changed(start: Base, base: Base, step: AdapterStep, kind: str, groups: int) -> Base:
    """Return the weight and bias after a step, given the base's and those before the step."""
    p = widened(step.params)
    part = step.placement.part
    if part is None:
        return _fold(step, start, base, p, kind, groups)
    index, axis = row_index(part.rows).to(base.weight.device), step.placement.site.rows_axis
    first, rows = (
        Base(b.weight.index_select(axis, index), None if b.bias is None else b.bias[index]) for b in (start, base)
    )
    new, bias = _fold(step, first, rows, p, kind, groups), base.bias
    if new.bias is not None:
        bias = (base.weight.new_zeros(len(base.weight)) if bias is None else bias).index_copy(0, index, new.bias)
    return Base(base.weight.index_copy(axis, index, new.weight), bias)


def _fold(step: AdapterStep, start: Base, base: Base, p: Params, kind: str, groups: int) -> Base:
    found = on_weight(step.placement.method, start, base, p, kind, groups)
    return step.placement.method.fold_over(step.placement.view, start, base, p) if found is None else found
