"""Where an adapter's outputs are not those that HF PEFT computes: it is said when its files are read or written."""

from __future__ import annotations

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.placed import Placements
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
