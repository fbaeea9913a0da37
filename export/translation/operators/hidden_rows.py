"""Attention whose mask hides every key from a token: torch gives 0 for it, and ONNX Runtime something else.

A boolean mask gives the mean of the values there. A mask in floating point with -inf, as `torch.nn.TransformerEncoder`
makes one of a padding mask, gives NaN, which all outputs of a text show; so zeros are always put there.

Where a boolean mask changes no token that counts, nothing is done: where each row of it shows a key, where the rows
without one are padding that no other token sees (causal masks), or where all outputs are of tokens. This is seen by
computing the mask for a padded text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftfx.analysis.dataflow import ancestors
from peftfx.errors import raise_if_memory_is_out
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_PAST = "past"  #: an axis of views with a cache, whose attention is causal
_MOST = 500  #: the most nodes that may compute a mask
_SHORTEST, _LONGEST = 64, 2048  #: the length of the padded text


def zero_hidden_rows(rewriter: Rewriter, graph: Graph) -> None:
    """Put zeros where the mask of an attention hides all keys, if that may matter."""
    if any(_PAST in spec.shape for spec in graph.inputs):
        return
    shown: dict[fx.Node, fx.Node | None] = {}
    for node in list(graph.nodes()):
        mask = _mask_of(node)
        if mask is None:
            continue
        if mask not in shown:
            shown[mask] = _rows_that_see(rewriter, mask, graph)
        rows = shown[mask]
        if rows is not None:
            at = rewriter.after(node)
            rewriter.extend(node, at.call(aten.where.ScalarOther, rows, node, 0.0))


def _rows_that_see(rewriter: Rewriter, mask: fx.Node, graph: Graph) -> fx.Node | None:
    """Return a node that tells the rows of a mask that show a key; None if it does not matter."""
    if mask.meta["val"].dtype != torch.bool:
        keys = rewriter.after(mask).call(aten.ne.Scalar, mask, -math.inf)
        return rewriter.after(keys).call(aten.any.dim, keys, -1, True)
    return rewriter.after(mask).call(aten.any.dim, mask, -1, True) if _matters(mask, graph) else None


def _mask_of(node: fx.Node) -> fx.Node | None:
    """Return the mask of an attention: one with -inf, or a boolean one for each token of the queries."""
    if node.target is not _ATTENTION:
        return None
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    value = mask.meta.get("val") if isinstance(mask, fx.Node) else None
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    assert isinstance(mask, fx.Node)
    hides = not _is_one(value.shape[-2]) if value.dtype == torch.bool else _writes_infinity(mask)
    return mask if hides else None


def _writes_infinity(mask: fx.Node) -> bool:
    """Return whether the code that computes a mask writes -inf into it."""
    near = itertools.islice(ancestors(mask), _MOST)
    return any(-math.inf in (*node.args, *node.kwargs.values()) for node in near)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _matters(mask: fx.Node, graph: Graph) -> bool:
    """Return whether a token that counts may see no key."""
    read = _sources(mask, graph)
    if read is None:
        return True
    numbers = (arg for node in read for arg in node.args if type(arg) is int and arg <= _LONGEST)
    length = min(_LONGEST, max(_SHORTEST, 4 * max(numbers, default=0)))
    text = torch.ones(1, length, dtype=torch.long)
    whole = _computed(mask, read, graph, text)
    if whole is None:
        return True
    for padding in (slice(0, length // 2), slice(length // 2, None)):
        text = torch.ones(1, length, dtype=torch.long)
        text[:, padding] = 0
        made = _computed(mask, read, graph, text)
        if made is None:
            return True
        hidden = ~made.any(-1).reshape(-1, made.shape[-2]).all(0)
        if not hidden.any():
            continue
        if made.shape[-2] != length or bool((hidden & (text[0] != 0)).any()):
            return True
        if bool(whole.triu(1).any()) and not all(_of_tokens(value, graph) for value in _outputs(graph)):
            return True
    return False


def _sources(mask: fx.Node, graph: Graph) -> set[fx.Node] | None:
    """Return the nodes that compute a mask, including it; None if they are many, or read weights."""
    found = set[fx.Node]()
    for node in ancestors(mask):
        found.add(node)
        if len(found) > _MOST or (node.op == "get_attr" and isinstance(graph.get(str(node.target)), nn.Parameter)):
            return None
    return found


def _computed(mask: fx.Node, read: set[fx.Node], graph: Graph, text: Tensor) -> Tensor | None:
    """Return a mask for a text that is padded so, or None if it depends on more than the text."""
    known: dict[fx.Node, Any] = {}
    axes = {spec.name: spec.shape for spec in graph.inputs}
    try:
        for node in graph.module.graph.nodes:
            if node not in read:
                continue
            if node.op == "placeholder":
                given = _given(str(node.target), axes.get(str(node.target), ()), text)
                if given is None:
                    return None
                known[node] = given.to(node.meta["val"].dtype)
            elif node.op == "get_attr":
                known[node] = graph.get(str(node.target))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    except Exception as error:  # an operator that does not take a text of this length
        raise_if_memory_is_out(error)
        return None
    made = known[mask]
    return made if isinstance(made, Tensor) else None


def _given(name: str, axes: Sequence[int | str], text: Tensor) -> Tensor | None:
    """Return an input of a graph for a padded text, or None if it is no part of a text. Slots are empty."""
    if len(axes) == 2 and all(isinstance(axis, str) for axis in axes):
        counted = torch.arange(text.shape[1])[None]
        return text if "mask" in name else counted if "position" in name else torch.zeros_like(text)
    if sum(isinstance(axis, str) for axis in axes) != 1:
        return None
    return torch.zeros([0 if isinstance(axis, str) else axis for axis in axes])


def _outputs(graph: Graph) -> Iterator[object]:
    for node in graph.module.graph.output_node().all_input_nodes:
        yield node.meta.get("val")


def _of_tokens(value: object, graph: Graph) -> bool:
    """Return whether an output has the axis of a text's tokens."""
    lengths = {
        str(node.meta["val"].shape[1])
        for node in graph.module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim == 2
    }
    return isinstance(value, Tensor) and any(str(size) in lengths for size in value.shape[1:])
