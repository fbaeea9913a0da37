"""prepare: a graph made ready for translation, rewritten on a copy without any change of meaning in inference."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.graph import Graph

aten = torch.ops.aten
_CASTS = {aten.to.dtype: 3, aten.to.device: 4, aten.to.dtype_layout: 6, aten.to.other: 3}  # where `copy` stands
_TRANSPOSES = {aten.transpose.int, aten.permute.default}
_SDPA = aten.scaled_dot_product_attention.default
_WHOLE = (None, 2**63 - 1, 1)  # the start, end and step of a slice that takes everything
_WHOLES = ((0, None, 1), (0, 2**63 - 1, 1), (None, None, 1), _WHOLE)


def prepare(graph: Graph) -> Graph:
    """Drop what does nothing (casts to the same type, whole slices), and give SDPA's transposed outputs plain strides.

    The strides matter because torch's decompositions of SDPA lay its output out otherwise than SDPA itself does, and
    a `view` that the model was right to take then fails; the copy becomes an Identity and goes away again. SDPA without
    heads gets one head: its translation wants four axes.
    """
    result = graph.clone()
    for node in list(result.nodes()):
        if node.target is _SDPA and _rank(node) == 3:
            _widen(result.module.graph, node)
        elif _does_nothing(node):
            node.replace_all_uses_with(_source(node))
            result.module.graph.erase_node(node)
        elif node.target in _CASTS and isinstance(node.meta.get("val"), torch.Tensor):
            # One form for all casts, and one that the translation knows.
            node.target, node.args, node.kwargs = (
                aten._to_copy.default,
                node.args[:1],
                {"dtype": node.meta["val"].dtype},
            )
        elif node.target in _TRANSPOSES and _source(node).target is _SDPA:
            _make_contiguous(result.module.graph, node)
    for node in reversed(list(result.nodes())):  # fx's own pass would insist that derived weights exist by now
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            result.module.graph.erase_node(node)
    return result


def _does_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _CASTS:
        return _is_same_type(node)
    if node.target is aten.slice.Tensor:
        bounds = (*node.args[2:], *_WHOLE[len(node.args) - 2 :])
        return not node.kwargs and bounds in _WHOLES
    return node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def _is_same_type(node: fx.Node) -> bool:
    position = _CASTS[node.target]  # type: ignore[index]
    copies = node.kwargs.get("copy", node.args[position] if len(node.args) > position else False)
    before, after = _source(node).meta.get("val"), node.meta.get("val")
    if copies or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return bool(before.dtype == after.dtype and before.device == after.device)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node), node
    return source


def _make_contiguous(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta = dict(node.meta)
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def _rank(node: fx.Node) -> int:
    value = _source(node).meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _widen(graph: fx.Graph, node: fx.Node) -> None:
    """SDPA over (batch, length, width) becomes SDPA over (batch, 1, length, width)."""
    with graph.inserting_before(node):
        wide = [graph.call_function(aten.unsqueeze.default, (x, 1)) for x in node.args[:3]]
        mask = node.args[3:4]
        if mask and isinstance(mask[0], fx.Node) and mask[0].meta["val"].ndim == 3:
            mask = (graph.call_function(aten.unsqueeze.default, (mask[0], 1)),)
    node.args = (*wide, *mask, *node.args[4:])
    with graph.inserting_after(node):
        narrow = graph.call_function(aten.squeeze.dim, (node, 1))
    narrow.meta = dict(node.meta)
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
