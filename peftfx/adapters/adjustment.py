"""The step between training steps in which a method changes its own parameters, as AdaLoRA reallocates its ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError


@torch.no_grad()
def adjust(adapters: Iterable[Adapter], step: int) -> None:
    """Let each rule whose method changes its parameters between training steps do so; see `Method.adjust`.

    Raises:
        PeftfxError: no rule has such a method, or there are no gradients.
    """
    rules = [(a, r) for a in adapters for r in a.placed if r.method.adjusts]
    if not rules:
        raise PeftfxError(
            "update_and_allocate changes none of the active adapters",
            "update_and_allocate",
            "make an adapter of AdaLoRA or AdaMSS active (set_adapter)",
        )
    for adapter, rule in rules:
        rule.method.adjust([_Place(adapter, placement) for placement in rule.placements], step)


@dataclass(frozen=True)
class _Place:
    """An adapter's tensors at one placement, as `Method.adjust` sees them; see `peftfx.contract.kept`."""

    adapter: Adapter
    placement: Placement

    @property
    def key(self) -> str:
        return self.placement.key

    def params(self) -> dict[str, Tensor]:
        return self.adapter.params(self.placement)

    def remembered(self) -> dict[str, Tensor]:
        names = self.placement.method.remembered()
        return {name: t for name, t in self.adapter.all_of(self.placement).items() if name in names}

    def remember(self, name: str, value: Tensor) -> None:
        self.adapter.put(f"{self.key}.{name}", value, trained=False)

    def forget(self, names: Collection[str]) -> None:
        holder = self.adapter.get_submodule(self.key)
        for name in set(names) & holder._buffers.keys():
            delattr(holder, name)
