"""Places in embedded text that the model's code counts: it raises an error unless there are as many as rows to write.

transformers' code for images in a text compares the number of image tokens with that of features, and then writes by
`masked_scatter`. A graph has no such check, and `masked_scatter` drops the rows that are left over: with a token too
few, each later image would be one place off, silently. `index_put` takes exactly as many rows as there are places.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten
_WRITES = {
    _aten.masked_scatter.default: _aten.index_put.default,
    _aten.masked_scatter_.default: _aten.index_put_.default,
}
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default}
_CHECKS = (_aten._is_all_true.default, _aten._assert_scalar.default)
_EQUALS = {_aten.eq.Scalar, _aten.eq.Tensor, operator.eq}
_OF_ONE = {_aten.mul.Tensor, _aten.mul.Scalar, _aten.item.default, *_CASTS}
_SIZES = {_aten.sym_size.int, _aten.sym_numel.default}
_ANDS = {_aten.bitwise_and.Tensor, _aten.__and__.Tensor}
#: Operators that give a mask of the same places in another form.
_SAME = {*_CASTS, _aten.unsqueeze.default, _aten.expand.default, _aten.expand_as.default}


def write_counted(graph: fx.Graph) -> None:
    """Write rows by `index_put`, in place of `masked_scatter`, where the code compares their number with the places'.

    Args:
        graph: a captured program, with the code's checks in it (`_is_all_true`, `_assert_scalar`), before dead code is
            removed.
    """
    counted = dict(_counted(graph))
    rewriter = Rewriter(graph)
    for node in list(graph.nodes) if counted else ():
        if node.target not in _WRITES:
            continue
        x, mask, source = node.args
        numbers = [counted[places] for form in forms(mask, if_asked=True) if (places := places_key(form)) in counted]
        shape, found = x.meta["val"].shape, mask.meta["val"]
        if found.ndim != len(shape) or not isinstance(shape[-1], int) or not _for_rows(mask):
            continue
        size = source.meta["val"].numel()
        if any(number is None or _counts(number, shape[-1], size) for number in numbers):
            at = rewriter.before(node)
            places = at.call(_aten.select.int, mask, -1, 0)
            rows = at.call(_aten.reshape.default, source, [-1, shape[-1]])
            rewriter.update(node, _WRITES[node.target], x, [places], rows)


def _counted(graph: fx.Graph) -> Iterator[tuple[object, int | torch.SymInt | None]]:
    """Yield places that the code counts, and the number that it compares with, perhaps of elements of rows.

    The code adds up a mask, and says that the sum is equal to a number. Or it takes what is at the places only to see
    how many elements these are: of what it then says no number is left.
    """
    for check in _CHECKS:
        for node in graph.find_nodes(op="call_function", target=check):
            yield from _compared(node.args[0])
    for taken in graph.find_nodes(op="call_function", target=_aten.index.Tensor):
        mask = taken.args[1][0]
        places = len(taken.args[1]) == 1 and isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool
        if places and all(user.target in _SIZES for user in taken.users):
            yield from ((places_key(form), None) for form in forms(mask))


def _compared(equal: fx.node.Argument) -> Iterator[tuple[object, int | torch.SymInt]]:
    """Yield places whose sum a check says to be equal to a number, and the number."""
    if not isinstance(equal, fx.Node) or equal.target not in _EQUALS:
        return
    count, number = equal.args
    while isinstance(count, fx.Node) and count.target in _OF_ONE:
        count = count.args[0]
    value = number.meta["val"] if isinstance(number, fx.Node) else number
    if not isinstance(count, fx.Node) or count.target is not _aten.sum.default:
        return
    (mask,) = count.all_input_nodes
    if isinstance(value, int | torch.SymInt):
        yield from ((places_key(form), value) for form in forms(mask))


def places_key(mask: fx.Node) -> object:
    """Return a key that is equal for masks of the same places: code may compare a text with a token again."""
    return (mask.target, mask.args) if mask.target is _aten.eq.Scalar else mask


def forms(mask: fx.Node, *, if_asked: bool = False) -> Iterator[fx.Node]:
    """Yield a mask and the masks of the same places that it was made of.

    Args:
        mask: the mask.
        if_asked: whether to go on to a mask that is used only if one boolean says so.
    """
    while True:
        yield mask
        if mask.target not in _SAME and not (if_asked and _is_switched(mask)):
            return
        mask = mask.args[0]  # type: ignore[assignment]


def _is_switched(mask: fx.Node) -> bool:
    return mask.target in _ANDS and mask.args[1].meta["val"].ndim == 0  # type: ignore[union-attr]


def _for_rows(mask: fx.Node) -> bool:
    """Return whether a mask has the same for all elements of a row."""
    for form in forms(mask, if_asked=True):
        if form.target is _aten.unsqueeze.default:
            return form.args[1] in (-1, form.meta["val"].ndim - 1)
    return False


def _counts(number: int | torch.SymInt, width: int, size: int | torch.SymInt) -> bool:
    """Return whether a number is that of the elements of all rows, or that of rows."""
    return statically_known_true(number == size) or statically_known_true(number * width == size)
