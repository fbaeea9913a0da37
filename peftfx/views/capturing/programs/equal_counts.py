"""Rows that a mask chooses, equally many in each text: the model's code raises an error if the texts' counts differ.

transformers' classifiers with a decoder read each text's last end token, `rows[mask].view(texts, -1, width)[:, -1]`,
and check before that each text has as many as the next. A graph has no such check, and `-1` takes the mean of the
counts: of 1 and 3 end tokens, each text would get two, silently. With the largest count in its place there are too few
rows unless all counts are equal, and torch and ONNX Runtime refuse the view.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftfx.graph.rewriter import Rewriter
from peftfx.views.capturing.programs.counted_places import forms, places_key

_aten = torch.ops.aten
_SIZES = {_aten.sym_size.int, _aten.sym_numel.default}
_VIEWS = {_aten.view.default, _aten.reshape.default}


def view_by_largest_count(graph: fx.Graph) -> None:
    """View the rows that a mask chooses by the largest count of a text, where the code says that all counts are equal.

    Args:
        graph: a captured program, with the code's checks in it (`_assert_scalar`), before dead code is removed.
    """
    counts = {places_key(form): count for count in _equal(graph) for form in forms(count.all_input_nodes[0])}
    rewriter = Rewriter(graph)
    for taken in graph.find_nodes(op="call_function", target=_aten.index.Tensor) if counts else ():
        masks: Any = taken.args[1]
        if len(masks) != 1 or not isinstance(masks[0], fx.Node):
            continue
        count = next((counts[key] for form in forms(masks[0]) if (key := places_key(form)) in counts), None)
        if count is None:
            continue
        for view in list(taken.users):
            if view.target in _VIEWS and _is_by_text(view, taken, count):
                at = rewriter.before(view)
                largest = at.call(_aten.amax.default, count, [0])
                number = at.call(_aten.item.default, largest, value=view.meta["val"].shape[1])
                texts, _, *rest = view.args[1]
                made = at.call(view.target, taken, [texts, number, *rest], value=view.meta["val"])
                rewriter.replace(view, made)


def _equal(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the counts of places in each text of which the code says that they are equal."""
    for check in graph.find_nodes(op="call_function", target=_aten._assert_scalar.default):
        equal: Any = check.args[0]
        if not isinstance(equal, fx.Node) or equal.target is not operator.eq or equal.args[1] != 1:
            continue
        size: Any = equal.args[0]
        if not isinstance(size, fx.Node) or size.target not in _SIZES:
            continue
        different: Any = size.args[0]
        if different.target is not operator.getitem or different.args[1] != 0:
            continue
        if different.args[0].target is not _aten.unique_consecutive.default:
            continue
        count = different.args[0].args[0]
        if count.target is _aten.sum.dim_IntList and count.args[1] in ([1], [-1]) and count.meta["val"].ndim == 1:
            yield count


def _is_by_text(view: fx.Node, taken: fx.Node, count: fx.Node) -> bool:
    """Return whether a view of the rows that were taken has an axis of texts, and leaves open how many each has."""
    sizes, shape, rows = view.args[1], view.meta["val"].shape, taken.meta["val"].shape
    if len(sizes) != len(rows) + 1 or sizes[1] != -1:  # type: ignore[arg-type, index]
        return False
    texts = count.meta["val"].shape[0]
    return all(statically_known_true(a == b) for a, b in zip((shape[0], *shape[2:]), (texts, *rows[1:]), strict=True))
