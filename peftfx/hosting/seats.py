"""Seats: where placements act in a base's modules, as plain data that copies and pickles take with them."""

from __future__ import annotations

from dataclasses import dataclass

from peftfx.contract.override import Override
from peftfx.contract.placement import AttentionPlacement, PatternPlacement, WeightPlacement
from peftfx.passes.rewriting.site_op import Operation


@dataclass(frozen=True)
class WeightSeat:
    """A weight method at the output of a module.

    Attributes:
        path: of the module.
        placement: what acts.
        operation: the site's own.
        bias: the name of the module's bias.
        inner: whether it acts at the output of torch's own forward, that the module's forward calls and computes on.
    """

    path: str
    placement: WeightPlacement
    operation: Operation
    bias: str | None
    inner: bool


@dataclass(frozen=True)
class AttentionSeat:
    """An attention method at the fused attention that a module calls.

    Attributes:
        path: of the module.
        placement: what acts.
        behind: whether it acts on what leaves the module, and not on what the attention gives.
    """

    path: str
    placement: AttentionPlacement
    behind: bool


@dataclass(frozen=True)
class PatternSeat:
    """A pattern method at a module that computes what the pattern does, and nothing else.

    Attributes:
        path: of the module.
        placement: what acts.
    """

    path: str
    placement: PatternPlacement


@dataclass(frozen=True)
class CopySeat:
    """An adapter's copy of a tensor, or of its rows, that a module reads in the place of its own.

    Attributes:
        path: of the module.
        name: of the tensor there.
        override: the copy.
    """

    path: str
    name: str
    override: Override


Seat = WeightSeat | AttentionSeat | PatternSeat | CopySeat


@dataclass(frozen=True)
class Seating:
    """Where all of an adapter acts in the base's modules.

    Attributes:
        seats: in the order in which they act; none for what acts outside of the modules, as a soft prompt.
        obstacle: why the modules cannot host it; empty where they can.
    """

    seats: tuple[Seat, ...] = ()
    obstacle: str = ""
