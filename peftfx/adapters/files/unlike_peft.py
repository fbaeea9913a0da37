"""Where an adapter's outputs are not those that HF PEFT computes, or its file is of another base: it is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.bases.guests import own_modules
from peftfx.contract.placed import Placements
from peftfx.contract.weight import WeightMethod
from peftfx.errors import warn


def warn_unlike_peft(base: nn.Module, placements: Placements, where: str) -> None:
    """Name the modules at which HF PEFT computes something else, and why."""
    found: dict[str, list[str]] = {}
    modules = dict(own_modules(base, remove_duplicate=False))
    for placement in placements.weights:
        module = modules.get(placement.site.path)
        if module is not None:
            why = placement.method.apart_from_peft(placement.site, module)
            found.setdefault(why, []).append(placement.site.path)
    for why, paths in found.items():
        if why:
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            warn(f"{where}: HF PEFT gives other outputs at {', '.join(paths[:3])}{more}: {why}")


@contextmanager
def telling_other_base(adapter: Adapter, where: str) -> Iterator[None]:
    """Inside, an adapter gets what its file has; a warning where that was made of another base than this one."""
    plain = WeightMethod.apart_from_base
    asked = [p for p in adapter.placements.weights if type(p.method).apart_from_base is not plain]
    made = {p: {name: t.detach().clone() for name, t in adapter.params(p).items()} for p in asked}
    yield
    for placement, own in made.items():
        if why := placement.method.apart_from_base(own, adapter.params(placement)):
            warn(f"{where}: {placement.site.path}: {why}")
            return
