"""Loops over the places where a mask is true: a capture runs the loop's code for every place.

Code of a mixture of experts loops over the experts that have tokens, `for expert in hit.nonzero()`. Which these are is
known only in a call. So a capture takes a turn of the loop for each place of the mask. Then it checks in the graph that
a turn changes nothing where the mask is false: such a turn adds rows to a tensor by indices, and has no indices there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from peftfx.errors import CaptureError
from peftfx.graph.capturing.loops.chosen_classes import chosen_classes
from peftfx.graph.written import source_of, written_by

aten = torch.ops.aten
_PLACES = frozenset({aten.nonzero.default, aten.where.default, aten.nonzero_numpy.default})
_ADDS = frozenset({aten.index_add.default, aten.index_add_.default})
_OVER_0 = frozenset({aten.gt.Scalar, aten.greater.Scalar, aten.ne.Scalar, aten.not_equal.Scalar})
#: Operators whose results are numbers of their first argument.
_MOVES = frozenset(
    {
        *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.alias.default),
        *(aten.permute.default, aten.transpose.int, aten.t.default, aten.view.default, aten.reshape.default),
        *(aten.select.int, aten.slice.Tensor, aten.clone.default, aten.contiguous.default, aten.detach.default),
        *(aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.expand.default),
    }
)


@dataclass
class _Turn:
    """One turn of a loop: its place in the mask, the node of the place's number, and the nodes that it made.

    The nodes come after the node `start`.
    """

    place: int
    number: fx.Node
    start: fx.Node
    made: list[fx.Node] = field(default_factory=list)

    def so_far(self) -> Iterator[fx.Node]:
        """Iterate over the nodes that the code has made since the start."""
        node = self.start
        while (node := node.next) is not node.graph._root:
            yield node

    def nodes(self) -> dict[fx.Node, None]:
        """Return the turn's nodes, with those that torch.export has put among them, without those that it erased."""
        found: dict[fx.Node, None] = {}
        kept = [node for node in self.made if not node._erased]
        node = kept[0] if kept else None
        while node is not None:
            found[node] = None
            node = None if node is kept[-1] else node.next
        return found


@dataclass
class _Loop:
    """A loop in a captured program: the node that gives the places, and the turns; `ended` if all were taken."""

    places: fx.Node
    turns: list[_Turn] = field(default_factory=list)
    ended: bool = False

    def skips(self, expr: sympy.Basic, following: str) -> bool:
        """Return whether code asks if the turn has no places, and does nothing else in the turn if so.

        Args:
            expr: what the code asks.
            following: the line of code after the question.
        """
        if self.ended or not self.turns or following.strip() != "continue":
            return False
        found = (node for node in self.turns[-1].so_far() if node.target in _PLACES)
        return any(expr == sympy.Eq(_rows(node), 0) for node in found)


_RUNNING: list[_Loop] = []  #: the loops of the capture that runs


def skips_a_turn(expr: sympy.Basic, following: str) -> bool:
    """Return whether code asks if a turn of a running loop over a mask has no places, and then takes the next turn.

    The turn that is captured has places. If the loop is harmless, it changes nothing without.

    Args:
        expr: what the code asks.
        following: the line of code after the question.
    """
    return any(loop.skips(expr, following) for loop in _RUNNING)


@contextmanager
def over_masks() -> Iterator[None]:
    """Inside the context, a loop over `mask.nonzero()` takes a turn for each place of a mask of one axis.

    Raises:
        CaptureError: at the end of the context, if a turn may change something where the mask is false.
    """
    thread, write, iterate = threading.get_ident(), Tensor.__format__, Tensor.__iter__
    nonzero: Callable[..., Tensor] = torch.nonzero
    lengths: dict[int, tuple[Tensor, int]] = {}
    loops = _RUNNING
    before = len(loops)

    def places(mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = nonzero(mask, *args, **kwargs)
        if threading.get_ident() == thread and isinstance(made, Tensor) and mask.ndim == 1:
            length = mask.shape[0]
            if isinstance(length, int) and free_unbacked_symbols(made):
                lengths[id(made)] = made, length
        return made

    def each(tensor: Tensor) -> Iterator[Tensor]:
        found = lengths.get(id(tensor))
        return iterate(tensor) if found is None else _turns(*found, loops)

    def text(tensor: Tensor, form: str) -> str:
        number = getattr(tensor, "constant", None)  # of a tensor without data whose number is known
        return write(tensor, form) if number is None or tensor.ndim else format(number.item(), form)

    torch.nonzero = places  # type: ignore[assignment]
    Tensor.nonzero = places  # type: ignore[assignment, method-assign]
    Tensor.__iter__, Tensor.__format__ = each, text  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nonzero = nonzero  # type: ignore[assignment]
        del Tensor.nonzero
        Tensor.__iter__, Tensor.__format__ = iterate, write  # type: ignore[method-assign]
        own, loops[before:] = loops[before:], []
    if not all(_is_harmless(loop) for loop in own):
        what = "cannot capture this model: its code loops over the places where a mask is true"
        hint = "where the mask is false, a turn of the loop must change nothing: let it only add rows by index"
        raise CaptureError(what, hint=hint)


def _turns(found: Tensor, length: int, loops: list[_Loop]) -> Iterator[Tensor]:
    """Yield the number of each place as `nonzero` gives it, and record the nodes of each turn."""
    mode = proxy_tensor.get_proxy_mode()
    tracer: Any = None if mode is None else mode.tracer
    loop = None if tracer is None else _Loop(tracer.tensor_tracker[found].proxy.node)
    if loop is not None:
        loops.append(loop)
        length = min(length, chosen_classes(_counted(loop.places)) or length)  # no mask is true at the others
    for place in range(length if loop is not None else min(length, 1)):  # a dry run needs no more than one turn
        with torch._C.DisableTorchFunction():  # it is no known value of an image
            number = torch.tensor([place], device=found.device)
        if loop is None:
            yield number
            continue
        turn = _Turn(place, tracer.tensor_tracker[number].proxy.node, tracer.graph._root.prev)
        loop.turns.append(turn)
        yield number
        turn.made.extend(turn.so_far())
    if loop is not None:
        loop.ended = True


def _is_harmless(loop: _Loop) -> bool:
    """Return whether no turn changes anything where the mask is false."""
    mask = _counted(loop.places)
    return loop.ended and mask is not None and all(_leaves_all(turn, mask) for turn in loop.turns)


def _counted(places: fx.Node) -> fx.Node | None:
    """Return the tensor of numbers >= 0 that the mask of a loop is the sum of, over all axes but the first."""
    over = places.args[0]
    if not isinstance(over, fx.Node) or over.target not in _OVER_0 or over.args[1] != 0:
        return None
    total = over.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList or len(total.args) > 2:
        return None
    numbers, axes = total.args
    assert isinstance(numbers, fx.Node)
    count = numbers.meta["val"].ndim
    others = sorted(axis % count for axis in axes) == list(range(1, count))  # type: ignore[union-attr]
    return numbers if others and _is_never_negative(numbers) else None


def _is_never_negative(value: object) -> bool:
    while isinstance(value, fx.Node) and value.target in _MOVES and value.meta["val"].dtype != torch.bool:
        value = value.args[0]
    if not isinstance(value, fx.Node):
        return False
    if value.target is aten.mul.Tensor:
        return all(map(_is_never_negative, value.args))
    return value.meta["val"].dtype == torch.bool or value.target is aten.one_hot.default


def _leaves_all(turn: _Turn, mask: fx.Node) -> bool:
    """Return whether a turn only adds rows at places that come from its part of the mask."""
    nodes = turn.nodes()
    found = [n for n in nodes if n.target in _PLACES and _is_of_turn(n.args[0], mask, turn)]
    none = {_rows(node) for node in found}
    adds = {n for n in nodes if n.target in _ADDS and _rows(n.args[2]) in none}
    adds = {n for n in adds if n.args[0] in adds or n.args[0] not in nodes}
    for node in nodes.keys() - adds:
        outer = [w for w in written_by(node) if source_of(w) not in nodes or source_of(w) in adds]
        if outer or any(user not in nodes for user in node.users):
            return False
    return True


def _is_of_turn(value: object, mask: fx.Node, turn: _Turn) -> bool:
    """Return whether a value has only numbers of the mask at the turn's place."""
    while isinstance(value, fx.Node):
        if value.args[:1] == (mask,):
            picked = value.args[1:]
            by_number = value.target is aten.index.Tensor and list(picked[0]) == [turn.number]  # type: ignore[arg-type]
            return by_number or (value.target is aten.select.int and picked == (0, turn.place))
        if value.target not in _MOVES:
            return False
        value = value.args[0]
    return False


def _rows(node: object) -> object:
    """Return the number of rows of a node's first tensor, as a symbol if it is not known."""
    assert isinstance(node, fx.Node)
    value = node.meta["val"]
    rows = (value[0] if isinstance(value, (tuple, list)) else value).shape[0]
    return rows if isinstance(rows, int) else rows.node.expr
