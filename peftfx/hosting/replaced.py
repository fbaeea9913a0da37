"""What a module reads in place of a tensor of its own: an adapter's copy, or the sum of the tensor and updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.contract.acting import Acting
from peftfx.contract.completeness import asking
from peftfx.contract.placement import owner_of
from peftfx.hosting.seats import CopySeat, FoldSeat
from peftfx.sites.blocks import turned


class Parameters:
    """The parameters of a placement, read at each call from the adapter's modules."""

    def __init__(self, adapter: Adapter, keys: Mapping[str, str]) -> None:
        self.held = [(name, *owner_of(adapter, key)) for name, key in keys.items()]

    def __call__(self) -> dict[str, Tensor]:
        return {name: getattr(owner, leaf) for name, owner, leaf in self.held}


class Copy:
    """An adapter's copy of a module's tensor, or of some rows of the tensor or of a whole copy of it."""

    def __init__(self, seat: CopySeat, adapter: Adapter, whole: Copy | None = None) -> None:
        self.owner, self.leaf = owner_of(adapter, seat.override.key)
        self.indices = owner_of(adapter, seat.override.indices) if seat.override.rows else None
        self.whole = whole if seat.override.rows else None

    def read(self, own: Tensor) -> Tensor:
        """Return the tensor that the module reads in place of its own tensor."""
        value: Tensor = getattr(self.owner, self.leaf)
        if self.indices is None:
            return value
        under = own if self.whole is None else self.whole.read(own)
        return torch.index_put(under, (getattr(*self.indices),), value.to(under.dtype))


class FoldedTensor:
    """The methods of an adapter that are folded into a module's tensor: each reading of it gives the sum."""

    def __init__(self) -> None:
        self.steps: list[tuple[Acting, Parameters]] = []

    def add(self, seat: FoldSeat, adapter: Adapter) -> None:
        """Add a method, after those that are folded in before it."""
        self.steps.append((Acting.of(seat.placement), Parameters(adapter, adapter.keys(seat.placement))))

    def read(self, own: Tensor) -> Tensor:
        """Return the tensor that the module reads in place of its own tensor."""
        for acting, params in self.steps:
            site, base = acting.site, acting.base(own, None)
            # As in HF PEFT, autocast rounds the sum, and no part of it.
            with asking(acting.method, "fold", site.role), torch.autocast(own.device.type, enabled=False):
                made = acting.method.fold(site, base, params()).weight.to(own.dtype)
            if acting.block is not None:
                made = acting.block.put(turned(own, acting.transposed), made, site.rows_axis)
            own = turned(made, acting.transposed)
        return own
