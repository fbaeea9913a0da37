"""Replace operators that change a tensor in place by operators that return the result, where nothing else can tell."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload


def make_functional(graph: fx.Graph) -> list[fx.Node]:
    """Replace writes to new tensors. Return the writes that stay: another name of their memory is read later.

    `y += x` becomes `y + x`: the next readers of `y` read the sum. With a write left in a graph, a copy is not the same
    as its source, and fewer operators can be dropped.
    """
    stay = []
    for node in [n for n in graph.nodes if isinstance(n.target, OpOverload) and n.target._schema.is_mutable]:
        before, functional = node.args[0] if node.args else None, _functional_form(node.target)
        if functional is None or not isinstance(before, fx.Node) or not _is_local(node, before):
            stay.append(node)
            continue
        node.target = functional
        before.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)  # type: ignore[misc]
    return stay


def _is_local(write: fx.Node, target: fx.Node) -> bool:
    """Say whether a write changes `target` alone, which no input is, and no other name of that memory is read later."""
    if "out" in write.kwargs:
        return False
    assert isinstance(write.target, OpOverload)
    changed = [a for a in write.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    dtypes = {n.meta["val"].dtype for n in write.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    others = {name for name in _names_of_memory(target) - {target} if name < write}  # later names are of the result
    seen_later = any(user > write for name in others for user in name.users)
    owned = all(n.op == "call_function" and isinstance(n.target, OpOverload) for n in {target, *others})
    return len(changed) == 1 and len(floating) <= 1 and owned and not seen_later


def _names_of_memory(node: fx.Node) -> set[fx.Node]:
    """Return the nodes whose values may share memory with the value of `node`."""
    root = node
    while _is_view(root) and root.args and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    found, waiting = set(), [root]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [user for user in name.users if _is_view(user)]
    return found


def _is_view(node: fx.Node) -> bool:
    """Say whether the node's result may share memory with one of its arguments."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return False
    if not isinstance(node.target, OpOverload):
        return True
    # The schemas of `reshape`, `contiguous`, `to` and similar operators do not say that the result may be a view.
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    aliases = any(r.alias_info is not None for r in node.target._schema.returns)  # also a write's that stays
    return aliases or (composite and node.target not in _FRESH)


_FRESH = {torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.conv2d.default}


def _functional_form(target: object) -> OpOverload | None:
    """Return the functional form of an operator, such as `aten.add.Tensor` for `aten.add_.Tensor`, or None."""
    assert isinstance(target, OpOverload)
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)
