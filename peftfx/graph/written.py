"""Writes of a program into tensors: what they change, what they leave, and a refusal of parameters that are changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from peftfx.errors import PeftfxError
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.rewriter import Cursor


def refuse_written(graph: Graph) -> None:
    """Refuse code that changes one of the model's own parameters in a forward, as `Embedding(max_norm=)` does.

    The code would not change a merged or trained tensor that replaces the parameter. Buffers may be written.
    """
    for node in graph.nodes():
        for written in written_by(node):
            root = source_of(written)
            if root.op == "get_attr" and isinstance(graph.get(str(root.target)), nn.Parameter):
                path = str(root.target).removeprefix(f"{BASE}.")
                what = f"the model's code writes into its own parameter when it runs ({node.target})"
                hint = "compute it once ahead, and take it out of the forward"
                if node.target is torch.ops.aten.embedding_renorm_.default:
                    what = "an Embedding(max_norm=) scales rows of its own weight when it runs"
                    hint = "scale them once, with torch.renorm(weight, p, 0, max_norm), and set max_norm=None"
                raise PeftfxError(what, path, hint)


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values an operator writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    return [v for a, v in arguments if a.alias_info is not None and a.alias_info.is_write and isinstance(v, fx.Node)]


Memory = Mapping[int, object]
"""Memory by its identity, with what keeps it, so that no other memory gets this identity."""
MEMORY = "memory"  #: in a node's `meta` during a capture: its memory, if its value is that of another node


def memory_of(node: fx.Node) -> Memory:
    """Return the memory that a node's captured tensor lies in: equal for views of one tensor, empty for no tensor."""
    known: Memory | None = node.meta.get(MEMORY)
    value = node.meta.get("val")
    return known if known is not None else memory_of_tensor(value) if isinstance(value, torch.Tensor) else {}


def memory_of_tensor(tensor: torch.Tensor) -> Memory:
    """Return the memory of a tensor."""
    storage = tensor.untyped_storage()
    return {storage._cdata: storage}


def as_written(at: Cursor, target: fx.Node, value: fx.Node) -> fx.Node:
    """Return what `target.copy_(value)` leaves in the target: the value in the target's dtype and shape."""
    wanted = target.meta["val"]
    if value.meta["val"].dtype != wanted.dtype:
        value = at.call(torch.ops.aten.to.dtype, value, wanted.dtype)
    if str(value.meta["val"].shape) != str(wanted.shape):  # symbols that are equal in the example may differ elsewhere
        value = at.call(torch.ops.aten.expand_as.default, value, target)
    return value


def source_of(node: fx.Node) -> fx.Node:
    """Return the node that a value is a view of."""
    while isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
        returned = node.target._schema.returns
        if not returned or returned[0].alias_info is None:
            break
        node = node.all_input_nodes[0]
    return node
