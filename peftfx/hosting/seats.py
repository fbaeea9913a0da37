"""Seats: where placements act in a base's modules, as plain data that copies and pickles can carry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from peftfx.contract.override import Override
from peftfx.contract.placement import (
    AttentionPlacement,
    PatternPlacement,
    Placement,
    SequencePlacement,
    WeightPlacement,
)
from peftfx.passes.rewriting.site_op import Operation


@dataclass(frozen=True)
class WeightSeat:
    """The place of a weight method: the output of a module.

    Attributes:
        path: the module's path.
        placement: the placement.
        operation: the site's operation.
        bias: the name of the module's bias, or None.
        inner: whether the method acts at the output of torch's own layer, whose forward the module's forward calls.
    """

    path: str
    placement: WeightPlacement
    operation: Operation
    bias: str | None
    inner: bool


@dataclass(frozen=True)
class AttentionSeat:
    """The place of an attention method: the fused attention that a module calls.

    Attributes:
        path: the module's path.
        placement: the placement.
        behind: whether the method acts on the module's output, and not on the output of the attention.
    """

    path: str
    placement: AttentionPlacement
    behind: bool


@dataclass(frozen=True)
class PatternSeat:
    """The place of a pattern method: a module that computes only what the pattern computes.

    Attributes:
        path: the module's path.
        placement: the placement.
    """

    path: str
    placement: PatternPlacement


@dataclass(frozen=True)
class CopySeat:
    """The place of an adapter's copy of a tensor, or of its rows: the module that reads the copy.

    Attributes:
        path: the module's path.
        name: the tensor's name in the module.
        override: the adapter's copy.
    """

    path: str
    name: str
    override: Override


@dataclass(frozen=True)
class FoldSeat:
    """The place of a weight method that is folded into the tensor that a module reads.

    Attributes:
        path: the module's path.
        name: the tensor's name in the module.
        placement: the placement.
    """

    path: str
    name: str
    placement: WeightPlacement


@dataclass(frozen=True)
class TextSeat:
    """The place of virtual tokens: the module that embeds the text.

    Attributes:
        path: the module's path.
        placement: the placement.
    """

    path: str
    placement: SequencePlacement


Seat = WeightSeat | AttentionSeat | PatternSeat | CopySeat | FoldSeat | TextSeat


@dataclass(frozen=True)
class Seating:
    """All the places where an adapter acts in the base's modules, or the obstacle.

    Attributes:
        seats: the seats in the order in which they act; none for a prefix, which comes in a cache.
        obstacle: why the modules cannot host the adapter; empty if they can.
        dearer: why a graph runs the adapter for less memory, although the modules can host it; else empty.
    """

    seats: tuple[Seat, ...] = ()
    obstacle: str = ""
    dearer: str = ""

    def on(self, placements: Iterable[Placement]) -> Seating:
        """Return the same seats for these placements, which have other options."""
        by_key = {placement.key: placement for placement in placements}
        seats = (
            seat if isinstance(seat, CopySeat) else replace(seat, placement=by_key[seat.placement.key])  # type: ignore[arg-type]
            for seat in self.seats
        )
        return replace(self, seats=tuple(seats))
