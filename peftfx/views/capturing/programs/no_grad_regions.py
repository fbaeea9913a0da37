"""Regions under `torch.no_grad`: torch.export makes each a small program. This module inlines them.

Inlined layers are sites as all others. Values that leave the region are detached: as in the model, no gradient reaches
the weights and adapters in the region.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from peftfx.analysis.dataflow import op_name
from peftfx.graph.rewriter import Rewriter

_REGION = "wrap_with_set_grad_enabled"


def inline_no_grad(module: fx.GraphModule) -> tuple[str, ...]:
    """Inline, in place, every region, and every region inside it.

    Return the names of operations that write in a region into a value from outside it, which has a gradient. In the
    model that gradient passes by the operation, and in the program not at all.
    """
    todo, writes = list(module.graph.nodes), dict[str, None]()
    while todo:
        node = todo.pop()
        if op_name(node) == _REGION:
            writes |= dict.fromkeys(_writes(module, node))
            todo += _inline(module, node)
    return tuple(writes)


def _writes(module: fx.GraphModule, region: fx.Node) -> Iterator[str]:
    """Yield the names of a region's operations that write into values which are computed from parameters outside."""
    enabled, program, *operands = region.args
    assert isinstance(program, fx.Node)
    inner = module.get_submodule(str(program.target))
    assert isinstance(inner, fx.GraphModule)
    outside = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in () if enabled else inner.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            written = outside.get(_memory_of(node.all_input_nodes[0]))
            if isinstance(written, fx.Node) and _is_trained(written):
                yield f"{op_name(node)}_ under torch.no_grad"


def _memory_of(node: fx.Node) -> fx.Node:
    """Return the node whose memory a node's value has."""
    while node.op == "call_function" and node.target._schema.arguments[0].alias_info is not None:  # type: ignore[union-attr]
        node = node.all_input_nodes[0]
    return node


def _is_trained(node: fx.Node) -> bool:
    """Return whether a value is computed from parameters that need gradients, so that adapters may act before it."""
    todo, seen = [node], {node}
    while todo:
        source = todo.pop()
        if source.op == "get_attr" and getattr(source.meta.get("val"), "requires_grad", False):
            return True
        todo += [n for n in source.all_input_nodes if n not in seen]
        seen.update(source.all_input_nodes)
    return False


def _inline(module: fx.GraphModule, region: fx.Node) -> list[fx.Node]:
    """Replace a region by its nodes and results, in place, and return the new nodes."""
    enabled, program, *operands = region.args
    assert isinstance(program, fx.Node)
    inner = module.get_submodule(str(program.target))
    assert isinstance(inner, fx.GraphModule)
    copies: dict[fx.Node, fx.Node] = {}
    places = [n for n in inner.graph.nodes if n.op == "placeholder"]
    copies |= {p: n for p, n in zip(places, operands, strict=True) if isinstance(n, fx.Node)}
    rewriter = Rewriter(module.graph)
    for node in inner.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copies[node] = rewriter.before(region, node).copy(node, copies)
        if node.op == "get_attr":
            copies[node].target = _moved(module, inner, str(node.target), str(program.target))
    returned = next(n for n in inner.graph.nodes if n.op == "output").args[0]
    detach, results = torch.ops.aten.detach.default, [copies[n] for n in returned]
    if not enabled:
        for i, own in enumerate(map(_itself, returned)):
            if own in places:
                results[i] = copies[own]
            elif _is_tensor(results[i]):
                results[i] = rewriter.before(region, region).call(detach, results[i])
    for user in list(region.users):
        assert op_name(user) == "getitem"
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not program.users:
        module.graph.erase_node(program)
    return [copies[n] for n in inner.graph.nodes if n in copies and n.op == "call_function"]


def _itself(node: fx.Node) -> fx.Node:
    """Return the node whose very tensor a node gives back: `x.to(dtype)` is `x` where it has that dtype.

    Code outside the region that reads `x` afterwards reads the region's node, and is no part of the region.
    """
    while op_name(node) in ("to", "type_as", "contiguous"):
        given = node.args[0]
        if not (isinstance(given, fx.Node) and _is_alike(node, given)):
            break
        node = given
    return node


def _is_alike(node: fx.Node, given: fx.Node) -> bool:
    names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    if {**dict(zip(names, node.args)), **node.kwargs}.get("copy"):
        return False
    made, own = ((v.dtype, v.device, *map(str, v.stride())) for v in (node.meta["val"], given.meta["val"]))
    return made == own


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _moved(module: fx.GraphModule, inner: nn.Module, target: str, region: str) -> str:
    """Move an attribute of a region's program into the graph's module, and return its new name."""
    name = f"{region}_{target}".replace(".", "_")
    value: object = inner
    for part in target.split("."):
        value = getattr(value, part)
    setattr(module, name, value)
    return name
