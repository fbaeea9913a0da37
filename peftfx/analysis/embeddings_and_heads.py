"""Embeddings and output heads: the layers at a model's two ends.

An embedding is one of tokens, positions or types, judged by where its integer indices come from. A head's value is an
output of the graph, unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.analysis.dataflow import ACTIVATIONS, ELEMENTWISE, MOVEMENT, PRODUCTS, Flow, data_of, names, op_name
from peftfx.graph.graph import Graph
from peftfx.graph.places import module_at

_COUNTING = names("arange cumsum bucketize searchsorted")
_CREATION = names("zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like")
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_POSITION, _TYPE, _TOKEN = "embedding.position", "embedding.type", "embedding.token"


def embedding_role(graph: Graph, indices: fx.Node) -> str:
    """Return the role of an embedding that is looked up at `indices`.

    Counted indices (arange, a cumulated mask, a buffer that counts) are positions. The graph's own input is tokens,
    unless the name of the model's argument contains `position` or `token_type`. Constants are types.
    """
    found = set(_evidence(graph, indices))
    for role in (_POSITION, _TOKEN, _TYPE):
        if role in found:
            return role
    return _TOKEN


def _evidence(graph: Graph, indices: fx.Node) -> Iterator[str]:
    seen, todo = {indices}, [indices]
    while todo:
        node = todo.pop()
        name = op_name(node)
        if node.op == "placeholder":
            yield _of_input(node.name)
        elif node.op == "get_attr":
            yield _of_buffer(graph.get(str(node.target)))
        elif name in _COUNTING:
            yield _POSITION
        else:
            values = _values(node, name)
            if name in _CREATION and not values:
                yield _TYPE
            todo += [n for n in values if n not in seen]
            seen.update(values)


def _values(node: fx.Node, name: str) -> list[fx.Node]:
    """Return the operands that the node's values come from, without conditions, indices and sizes."""
    if name in _CREATION:
        return list(_written_into(node))
    first = node.args[:1] if name in ("gather", "index", "index_select", "masked_fill") else node.args
    args = node.args[1:] if name == "where" else first
    found: list[fx.Node] = []
    fx.node.map_arg(args, lambda n: found.append(n) if isinstance(n.meta.get("val"), torch.Tensor) else None)
    return found


def _written_into(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the values that are copied into a fresh tensor or a slice of it, as shifted labels are."""
    for user in node.users:
        if op_name(user) == "copy" and user.args[0] is node and isinstance(user.args[1], fx.Node):
            yield user.args[1]
        elif op_name(user) in ("slice", "select"):
            yield from _written_into(user)


def _of_input(name: str) -> str:
    if "position" in name:
        return _POSITION
    return _TYPE if "token_type" in name else _TOKEN


def _of_buffer(values: torch.Tensor) -> str:
    if values.is_floating_point() or isinstance(values, FakeTensor) or values.is_meta or values.numel() < 2:
        return _TYPE
    last = values.reshape(-1, values.shape[-1])
    counts = values.shape[-1] > 1 and bool((last.diff(dim=-1) == 1).all())
    return _POSITION if counts else _TYPE


def reaches_output(graph: Graph, flows: Mapping[fx.Node, Flow], kept: Collection[str]) -> set[fx.Node]:
    """Return the nodes whose values reach an output only moved, scaled, shifted or masked by constants.

    Args:
        graph: a base graph.
        flows: the dataflow of its nodes.
        kept: the names of outputs that do not count.
    """
    reached: set[fx.Node] = set()
    for node in reversed(list(graph.nodes())):
        if node.op == "output":
            named = zip(graph.outputs, node.args[0], strict=True)  # type: ignore[arg-type]
            results = (n for name, n in named if isinstance(n, fx.Node) and name not in kept)
            reached.update(n for n in results if flows[n].origins)
        elif node in reached and _keeps(node, flows):
            reached.update(data_of(node, flows))
    return reached


def is_codebook(graph: Graph, path: str, ops: Collection[fx.Node]) -> bool:
    """Return whether products with the rows of an embedding only choose a row: no gradient could train these products.

    Args:
        graph: a base graph.
        path: the path of the weight's module.
        ops: the products.
    """
    if not isinstance(module_at(graph.base, path), nn.Embedding):
        return False
    seen, todo = set(ops), list(ops)
    while todo:
        users = todo.pop().users
        if any(user.op == "output" for user in users):
            return False
        more = {user for user in users if _is_floating(user)} - seen
        seen |= more
        todo += more
    return True


def _is_floating(node: fx.Node) -> bool:
    values = node.meta.get("val")
    each = values if isinstance(values, (tuple, list)) else (values,)
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in each)


def reaches_any(graph: Graph, ops: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes from whose values some of these operators compute, in any way. Sizes do not count."""
    reaching: set[fx.Node] = set()
    for node in reversed(list(graph.nodes())):
        number = isinstance(node.meta.get("val"), _NUMBERS)
        if not number and any(user in ops or user in reaching for user in node.users):
            reaching.add(node)
    return reaching


def _keeps(node: fx.Node, flows: Mapping[fx.Node, Flow]) -> bool:
    name = op_name(node)
    if name in ACTIVATIONS:
        return name == "tanh" and _is_soft_cap(node)
    return name in MOVEMENT or (name in ELEMENTWISE and len(data_of(node, flows)) == 1) or name.startswith("upsample")


def _is_soft_cap(tanh: fx.Node) -> bool:
    """Return whether a tanh is part of `c * tanh(x / c)`, which bounds logits. Another tanh is an activation."""
    after = list(tanh.users)
    return len(after) == 1 and _scales(tanh.args[0]) and _scales(after[0])


def _scales(node: object) -> bool:
    return isinstance(node, fx.Node) and op_name(node) in PRODUCTS and len(node.all_input_nodes) == 1
