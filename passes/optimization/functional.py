"""Replace operators that change a tensor in place by operators that return the result, where nothing else can tell."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from peftfx.graph.rewriter import Rewriter
from peftfx.graph.written import as_written
from peftfx.passes.rewriting.matching import operand

aten = torch.ops.aten
#: How a changed part is put back into what it is a part of. The further arguments are those of the view.
_PUT_BACK = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def make_functional(rewriter: Rewriter, forgotten: Collection[fx.Node] = ()) -> list[fx.Node]:
    """Replace writes to new tensors. Return the writes that stay: another name of their memory is read later.

    `y += x` becomes `y + x`: the next readers of `y` read the sum. A write to a part, `y[:, 0] = x`, puts the part back
    into `y`. With a write left in a graph, a copy is not the same as its source, and fewer operators can be dropped.

    Args:
        rewriter: rewrites the graph.
        forgotten: nodes that read the model's own tensors, whose memory nothing else reads: no other node, and no later
            call. Writes to them are replaced as those to new tensors.
    """
    writes = [node for node in rewriter.graph.nodes if _writes(node)]
    return [node for node in writes if not _replaced(rewriter, node, forgotten)]


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _replaced(rewriter: Rewriter, write: fx.Node, forgotten: Collection[fx.Node]) -> bool:
    """Replace a write and return True; or return False if something that cannot be told of it may read the memory."""
    target = write.args[0] if write.args else None
    form = _functional_form(write.target)
    if form is None or not isinstance(target, fx.Node) or not _changes_one(write):
        return False
    names = {name for name in _names_of_memory(target) if name < write}  # later names are of the result
    made = (isinstance(name.target, OpOverload) or name.target is operator.getitem for name in names - {*forgotten})
    if not all(made):
        return False  # an input, or the model's own tensor
    parts = list(_parts(target))
    later = {name for name in names if any(user > write for user in name.users)}
    known = [target, *(operand(part) for part in parts)]
    if not later <= set(known):
        return False
    at = rewriter.before(write)
    if form is aten.copy.default:  # a tensor of its own, as the value may be written later
        new = at.call(aten.clone.default, as_written(at, *write.args[:2]))  # type: ignore[arg-type]
    else:
        new = at.call(form, *write.args, **write.kwargs)
        if new.meta["val"].dtype != (own := target.meta["val"].dtype):  # a write keeps the dtype of what it changes
            new = at.call(aten._to_copy.default, new, dtype=own)
    rewriter.replace(write, new)
    _read_later(rewriter, target, new, write)
    for part in parts[: max((known.index(name) for name in later), default=0)]:
        whole = operand(part)
        new = at.call(_PUT_BACK[part.target], whole, new, *part.args[1:])  # type: ignore[index]
        _read_later(rewriter, whole, new, write)
    rewriter.erase(write)
    return True


def _changes_one(write: fx.Node) -> bool:
    """Say whether a write changes its first operand alone."""
    assert isinstance(write.target, OpOverload)
    changed = [a for a in write.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return len(changed) == 1 and "out" not in write.kwargs


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the views through which a value is a part of another: itself, what it is a part of, and so on."""
    while node.target in _PUT_BACK and not node.kwargs:
        yield node
        node = operand(node)


def _read_later(rewriter: Rewriter, old: fx.Node, new: fx.Node, write: fx.Node) -> None:
    rewriter.replace(old, new, [user for user in old.users if user > write])


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
            waiting += [user for user in name.users if _is_view(user) and _may_share(user, name)]
    return found


def _may_share(view: fx.Node, name: fx.Node) -> bool:
    """Say whether a view may share memory with this one of its arguments."""
    return view.target not in _LIKE or view.args[0] is name


def _is_view(node: fx.Node) -> bool:
    """Say whether the node's result may share memory with one of its arguments."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return False
    if node.target is operator.getitem:
        return _is_view(operand(node))  # one of several results is of its own memory, if they are new
    if not isinstance(node.target, OpOverload):
        return True
    # The schemas of `reshape`, `contiguous`, `to` and similar operators do not say that the result may be a view.
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    aliases = any(r.alias_info is not None for r in node.target._schema.returns)  # also a write's that stays
    return aliases or (composite and node.target not in _FRESH)


#: Composite operators that always make a new tensor.
_FRESH = {
    *(aten.linear.default, aten.matmul.default),
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.group_norm.default, aten.layer_norm.default, aten.instance_norm.default, aten.batch_norm.default),
    *(aten.rms_norm.default, aten.softmax.int, aten.log_softmax.int),
}
#: Composite operators whose result may be a view of the first operand, and never of the second.
_LIKE = {
    *(aten.type_as.default, aten.to.other, aten.view_as.default, aten.reshape_as.default),
    aten.expand_as.default,
}


def _functional_form(target: object) -> OpOverload | None:
    """Return the functional form of an operator, such as `aten.add.Tensor` for `aten.add_.Tensor`, or None."""
    assert isinstance(target, OpOverload)
    namespace, name = target._schema.name.split("::")
    if name.startswith("__i"):  # `mask |= other` is `__ior__`, and `mask | other` is `__or__`
        plain = f"__{name.removeprefix('__i')}"
    elif name.endswith("_"):
        plain = name.removesuffix("_")
    else:
        return None
    return getattr(getattr(getattr(torch.ops, namespace), plain, None), target._overloadname, None)
