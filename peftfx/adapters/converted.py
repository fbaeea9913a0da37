"""Methods whose files hold other tensors than the trained ones: room for the file's tensors, and the conversion."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftfx.adapters.adapter import Adapter
from peftfx.contract.placement import WeightPlacement


def _converted(adapter: Adapter) -> Iterator[WeightPlacement]:
    """Return the placements whose file holds what `WeightMethod.written` computes, not the parameters themselves."""
    return (p for p in adapter.placements.weights if p.method.file_keys(p.site) != p.method.keys(p.site))


@torch.no_grad()
def make_room(adapter: Adapter) -> None:
    """Add to each new placement of a converted method empty tensors of the shapes in its file."""
    for placement in _converted(adapter):
        for name, value in placement.method.written(adapter.all_of(placement))[1].items():
            adapter.put(f"{placement.key}.{name}", value, trained=False)


@torch.no_grad()
def take_over(adapter: Adapter) -> dict[str, str]:
    """Convert the file's tensors to parameters, delete them, and map each deleted name to a parameter's name."""
    instead = {}
    for placement in _converted(adapter):
        holder, names = adapter.get_submodule(placement.key), placement.method.file_keys(placement.site)
        for name, value in placement.method.read({name: holder._buffers[name] for name in names}).items():  # type: ignore[misc]
            adapter.get(f"{placement.key}.{name}").copy_(value)
        for name in names:
            del holder._buffers[name]
            instead[f"{placement.key}.{name}"] = f"{placement.key}.{next(iter(placement.method.keys(placement.site)))}"
    return instead
