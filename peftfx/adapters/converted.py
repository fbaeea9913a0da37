"""Methods whose files have other tensors than they train: room for the file's while it is read, and then theirs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftfx.adapters.adapter import Adapter
from peftfx.contract.placement import WeightPlacement


def _converted(adapter: Adapter) -> Iterator[WeightPlacement]:
    """The placements whose file has what `WeightMethod.written` makes of their parameters."""
    return (p for p in adapter.placements.weights if p.method.file_keys(p.site) != p.method.keys(p.site))


@torch.no_grad()
def make_room(adapter: Adapter) -> None:
    """Beside the parameters of new placements, put tensors of the shapes that their file has."""
    for placement in _converted(adapter):
        for name, value in placement.method.written(adapter.all_of(placement))[1].items():
            adapter.put(f"{placement.key}.{name}", value, trained=False)


@torch.no_grad()
def take_over(adapter: Adapter) -> dict[str, str]:
    """Give the parameters what these tensors say, and drop them; for each that is gone, a parameter made of it."""
    instead = {}
    for placement in _converted(adapter):
        holder, names = adapter.get_submodule(placement.key), placement.method.file_keys(placement.site)
        for name, value in placement.method.read({name: holder._buffers[name] for name in names}).items():  # type: ignore[misc]
            adapter.get(f"{placement.key}.{name}").copy_(value)
        for name in names:
            del holder._buffers[name]
            instead[f"{placement.key}.{name}"] = f"{placement.key}.{next(iter(placement.method.keys(placement.site)))}"
    return instead
