"""Regions under `torch.no_grad`: torch.export makes each a small program. This module inlines them.

Inlined layers are sites as all others. Values that leave the region are detached: as in the model, no gradient reaches
the weights and adapters in the region.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from peftfx.analysis.dataflow import op_name
from peftfx.graph.rewriter import Rewriter

_REGION = "wrap_with_set_grad_enabled"


def inline_no_grad(module: fx.GraphModule) -> None:
    """Inline, in place, every region, and every region inside it."""
    todo = list(module.graph.nodes)
    while todo:
        node = todo.pop()
        if op_name(node) == _REGION:
            todo += _inline(module, node)


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
    results = [copies[n] for n in next(n for n in inner.graph.nodes if n.op == "output").args[0]]
    if not enabled:
        detach = torch.ops.aten.detach.default
        results = [rewriter.before(region, r).call(detach, r) if _is_tensor(r) else r for r in results]
    for user in list(region.users):
        assert op_name(user) == "getitem"
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not program.users:
        module.graph.erase_node(program)
    return [copies[n] for n in inner.graph.nodes if n in copies and n.op == "call_function"]


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
