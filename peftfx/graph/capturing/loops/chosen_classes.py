"""Chosen classes: how many of a mask's places can be true, where code counts more classes than it chooses from.

chosen = scores.topk(k).indices             # of `count` classes
mask = one_hot(chosen, count + 1)           # the last class is of padding, and nothing chooses it
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten
#: Operators that choose, with the place of their axis among the arguments. The second output has the chosen classes.
_CHOOSES = {aten.topk.default: 2, aten.sort.default: 1, aten.max.dim: 1}
_KEEPS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.clone.default),
        *(aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.t.default, aten.contiguous.default),
        *(aten.detach.default, aten.alias.default, aten.to.dtype, aten._to_copy.default, aten.expand.default),
        *(aten.select.int, aten.slice.Tensor),
    }
)


def chosen_classes(numbers: fx.Node | None) -> int | None:
    """Return how many classes can be chosen, given a mask whose first axis is of classes; None if that is not known.

    Args:
        numbers: the node of the mask, which the code has made from the chosen classes.
    """
    while isinstance(numbers, fx.Node) and numbers.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default):
        numbers = numbers.args[0]  # type: ignore[assignment]
    if not isinstance(numbers, fx.Node) or numbers.target is not aten.permute.default:
        return None
    made, order = numbers.args
    if not isinstance(made, fx.Node) or made.target is not aten.one_hot.default:
        return None
    if order[0] % made.meta["val"].ndim != made.meta["val"].ndim - 1:  # type: ignore[index]
        return None
    chosen = made.args[0]
    while isinstance(chosen, fx.Node) and chosen.target in _KEEPS:
        chosen = chosen.args[0]
    return _classes(chosen) if isinstance(chosen, fx.Node) else None


def _classes(chosen: fx.Node) -> int | None:
    """Return the size of the axis from which places are chosen."""
    if chosen.target is aten.argmax.default:
        source, axis = chosen.args[0], (*chosen.args[1:], None)[0]
    elif chosen.target is operator.getitem and chosen.args[1] == 1:
        made = chosen.args[0]
        place = next((place for kind, place in _CHOOSES.items() if made.target is kind), None)  # type: ignore[union-attr]
        if not isinstance(made, fx.Node) or place is None:
            return None
        source, axis = made.args[0], made.args[place] if len(made.args) > place else -1
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(axis, int):
        return None
    size = source.meta["val"].shape[axis]
    return size if isinstance(size, int) else None
