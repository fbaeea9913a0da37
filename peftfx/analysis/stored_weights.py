"""The parameter that an operation reads: through casts and transposes, whole or one item of a stack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from peftfx.analysis.dataflow import names, op_name
from peftfx.graph.graph import BASE, Graph

TRANSPOSES = names("t numpy_T mT transpose permute adjoint")
CAST_OPS = names("to _to_copy float half bfloat16 double type_as")
_AS_IT_IS = CAST_OPS | names("detach alias clone contiguous lift_fresh_copy")
_GROUPED = names("_grouped_mm transformers::grouped_mm_fallback")
_WHOLE = _GROUPED | names("bmm matmul")
_SINGLE = names("linear mm matmul")


def parameter_of(value: object) -> fx.Node | None:
    """Return the node that reads the base's tensor that `value` is, through casts to floating dtypes; or None."""
    if not isinstance(value, fx.Node):
        return None
    read = as_stored(value)
    return read if read.op == "get_attr" and str(read.target).startswith(f"{BASE}.") else None


def as_stored(node: fx.Node) -> fx.Node:
    """Return the node of a value before its casts, copies and detachments."""
    while node.op == "call_function" and op_name(node) in _AS_IT_IS and node.meta["val"].is_floating_point():
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


@dataclass(frozen=True)
class StackRead:
    """How an operation reads a stack of linear layers' weights, [layers, in, out] or [layers, out, in].

    Attributes:
        stored: the node that reads the parameter.
        number: the layer whose weight alone is read (`x @ W[3]`); None if the operation reads the whole stack.
        transposed: whether each weight is stored [in, out].
    """

    stored: fx.Node
    number: int | None
    transposed: bool


def stack_read(op: fx.Node) -> StackRead | None:
    """Return how an operation reads a stack of weights; None if it reads none."""
    name, weight = op_name(op), op.args[1] if len(op.args) > 1 else None
    if name not in _WHOLE | _SINGLE or not isinstance(weight, fx.Node):
        return None
    node, number, turned = as_stored(weight), None, False
    while node.op == "call_function":
        picked = _picked(node) if number is None else None
        if picked is not None:
            source, number = picked
        elif _turns(node):
            source, turned = node.args[0], not turned  # type: ignore[assignment]
        else:
            return None
        node = as_stored(source)
    stored = parameter_of(node)
    if stored is None or stored.meta["val"].ndim != 3 or name not in (_WHOLE if number is None else _SINGLE):
        return None
    return StackRead(stored, number, turned if name == "linear" else not turned)


def is_grouped(op: fx.Node) -> bool:
    """Return whether an operation multiplies groups of rows by the weights of a stack: it reads the groups' ends."""
    return op_name(op) in _GROUPED


def stack_reads(graph: Graph) -> dict[fx.Node, StackRead]:
    """Return the operations that read stacks of weights. Methods act on whole stacks: nothing else may read them."""
    found = {op: read for op in graph.nodes() if op.op == "call_function" and (read := stack_read(op)) is not None}
    targets = {read.stored.target for read in found.values()}
    stored = [node for node in graph.nodes() if node.op == "get_attr" and node.target in targets]
    shared = {node.target for node in stored if any(end not in found for end in operations_reading(node))}
    return {op: read for op, read in found.items() if read.stored.target not in shared}


def operations_reading(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the operations that read a tensor: as it is, cast, transposed, or an item of it."""
    for user in node.users:
        if op_name(user) in _AS_IT_IS | {"unbind"} or _turns(user) or _picked(user) is not None:
            yield from operations_reading(user)
        else:
            yield user


def _turns(node: fx.Node) -> bool:
    """Return whether a node swaps the last two axes of a tensor."""
    if node.op != "call_function" or op_name(node) not in TRANSPOSES:
        return False
    count = node.meta["val"].ndim
    last = [count - 2, count - 1]
    if op_name(node) == "transpose":
        return sorted(axis % count for axis in node.args[1:3]) == last
    if op_name(node) == "permute":
        return [axis % count for axis in node.args[1]] == [*range(count - 2), *reversed(last)]  # type: ignore[union-attr]
    return True


def _picked(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Return the tensor of which a node is one item of the first axis, and the item's number; or None."""
    if node.op != "call_function" or not node.args or not isinstance(source := node.args[0], fx.Node):
        return None
    if op_name(node) == "select":
        found = (source, *node.args[1:])
    elif op_name(node) == "getitem" and op_name(source) == "unbind":
        found = (source.args[0], *(source.args[1:2] or (0,)), node.args[1])
    else:
        return None
    tensor, axis, number = found
    return (tensor, number) if axis == 0 and isinstance(tensor, fx.Node) and isinstance(number, int) else None
