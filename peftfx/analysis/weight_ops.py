"""Occurrences: the ops of a graph that apply a weight of the base module, with the module of each op."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from peftfx.analysis.dataflow import is_depthwise, names, op_name
from peftfx.analysis.stored_weights import CAST_OPS, TRANSPOSES, StackRead, parameter_of, stack_reads
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.places import module_at
from peftfx.sites.site import EXPERTS

_VIEWS = names("view reshape _unsafe_view flatten")


@dataclass(frozen=True)
class Occurrence:
    """One `y = op(x, weight, bias)` in a graph. `x` and `y` are outside the reshapes and casts around the op."""

    path: str
    kind: str
    op: fx.Node
    x: fx.Node
    y: fx.Node
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    transposed: bool

    @property
    def mixes_features(self) -> bool:
        """Whether outputs depend on features of other channels: false for depthwise convolutions."""
        return self.kind != "conv" or not is_depthwise(self.op)

    @property
    def groups(self) -> int:
        """The number of groups into which a convolution splits its channels."""
        if self.kind != "conv":
            return 1
        return int(self.x.meta["val"].shape[1 - len(self.shape)]) // self.shape[1]

    @property
    def features(self) -> tuple[int, int]:
        """The axis of the op's output that runs over the weight's output rows, and its size."""
        if self.kind == "conv":
            return 1, self.shape[0]
        if self.kind == EXPERTS:
            return -1, self.shape[2 if self.transposed else 1]
        return -1, self.shape[-1 if self.transposed or self.kind == "embedding" else 0]


def find_occurrences(graph: Graph) -> Iterator[Occurrence]:
    """Yield the weight ops of a graph, in order. Those of one path do the same, as a path names one site.

    Where other code reads a module's weight for something else (`F.linear(x, embedding.weight)`), the path of that
    operation is the parameter's. A parameter without a layer is for what its first operation does.
    """
    found = list(_all_occurrences(graph))
    uses: dict[str, tuple[str, bool]] = {}
    for one in sorted(found, key=lambda one: not runs_in(one.op, one.path)):
        uses.setdefault(one.path, (one.kind, one.transposed))
    layers = {one.path for one in found if runs_in(one.op, one.path)}
    for one in found:
        if (one.kind, one.transposed) == uses[one.path]:
            yield one
        elif one.path in layers:
            yield dataclasses.replace(one, path=f"{one.path}.weight")


def _all_occurrences(graph: Graph) -> Iterator[Occurrence]:
    paths, stacks = _Paths(graph), stack_reads(graph)
    for node in graph.nodes():
        if node.op != "call_function":
            continue
        name = op_name(node)
        if node in stacks:
            yield _of_stack(paths, node, stacks[node])
        elif name == "linear":
            yield from _weighted(paths, "linear", node, node.args[0], node.args[1], _arg(node, 2))
        elif name in ("conv1d", "conv2d", "conv3d"):
            yield from _weighted(paths, "conv", node, node.args[0], node.args[1], _arg(node, 2))
        elif name == "embedding":
            yield from _weighted(paths, "embedding", node, node.args[1], node.args[0], None)
        elif name == "addmm" and len(node.kwargs) == 0:
            yield from _product(paths, node, node.args[1], node.args[2], node.args[0])
        elif name in ("mm", "matmul"):
            yield from _product(paths, node, node.args[0], node.args[1], None)


def _weighted(
    paths: _Paths, kind: str, op: fx.Node, x: object, weight: object, bias: object, transposed: bool = False
) -> Iterator[Occurrence]:
    weight, bias_node = parameter_of(weight), parameter_of(bias)
    if not isinstance(x, fx.Node) or weight is None or (bias_node is None and bias is not None):
        return
    x, y = (x, op) if kind != "linear" else _outside_views(op, x)
    x, y = (x, y) if y is not op else _outside_casts(op, x)
    shape = tuple(int(size) for size in paths.graph.get(str(weight.target)).shape)
    target = None if bias_node is None else str(bias_node.target)
    yield Occurrence(paths.of(op, weight), kind, op, x, y, str(weight.target), target, shape, transposed)


def _product(paths: _Paths, op: fx.Node, x: object, weight: object, bias: object) -> Iterator[Occurrence]:
    """Yield a linear layer that is written as a product: `x @ W` (W stored [in, out]) or `x @ W.T`."""
    turned = isinstance(weight, fx.Node) and op_name(weight) in TRANSPOSES
    stored = parameter_of(weight.args[0] if isinstance(weight, fx.Node) and turned else weight)
    if stored is None:
        return
    if paths.graph.get(str(stored.target)).ndim != 2:
        return
    for found in _weighted(paths, "linear", op, x, stored, bias, transposed=not turned):
        yield _with_added_bias(paths.graph, found) if found.bias is None else found


def _of_stack(paths: _Paths, op: fx.Node, read: StackRead) -> Occurrence:
    """Return the occurrence of a stack of linear layers, `x[i] @ W[layer of i]`, or of one layer of it, `x @ W[3]`."""
    x = op.args[0]
    assert isinstance(x, fx.Node)
    target = str(read.stored.target)
    shape = tuple(int(size) for size in paths.graph.get(target).shape)
    return Occurrence(paths.of(op, read.stored), EXPERTS, op, x, op, target, None, shape, read.transposed)


def _with_added_bias(graph: Graph, found: Occurrence) -> Occurrence:
    """Add the bias of `x @ W.T + b` to the occurrence, if only that sum uses the product."""
    user = next(iter(found.y.users), None)
    if user is None or len(found.y.users) != 1 or op_name(user) != "add" or user.args[0] is not found.y:
        return found
    bias = parameter_of(user.args[1])
    _, size = found.features
    if bias is None or tuple(graph.get(str(bias.target)).shape) != (size,):
        return found
    return Occurrence(
        *(found.path, found.kind, found.op, found.x, user, found.weight, str(bias.target), found.shape),
        transposed=found.transposed,
    )


def _outside_views(op: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the values outside `view(-1, in) -> op -> view(..., out)`, or else the op's own."""
    after = next(iter(op.users), None)
    wrapped = op_name(op) in ("addmm", "mm") and op_name(x) in _VIEWS and len(op.users) == 1
    if not wrapped or after is None or op_name(after) not in _VIEWS or not isinstance(x.args[0], fx.Node):
        return x, op
    outer = x.args[0]
    same_axes = outer.meta["val"].shape[:-1] == after.meta["val"].shape[:-1]
    return (outer, after) if same_axes else (x, op)


def _outside_casts(op: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the values outside `cast -> op -> cast back`, or else the op's own.

    Casts to the dtype that a value has are not looked past: they may be another step's, outside of the layer's module.
    """
    after = next(iter(op.users), None)
    wrapped = op_name(x) in CAST_OPS and x.meta["val"].is_floating_point() and len(op.users) == 1
    if not wrapped or after is None or op_name(after) not in CAST_OPS or not isinstance(x.args[0], fx.Node):
        return x, op
    outer, inner, back = (node.meta["val"].dtype for node in (x.args[0], x, after))
    return (x.args[0], after) if inner != outer == back else (x, op)


def _arg(node: fx.Node, index: int) -> object:
    return node.args[index] if len(node.args) > index else None


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that ran this node, relative to the base module."""
    stack = node.meta.get("nn_module_stack") or {}
    return base_path(next(reversed(list(stack.values())), ("",))[0])


def runs_in(node: fx.Node, path: str) -> bool:
    """Return whether a call of this module runs the node."""
    name = f"{BASE}.{path}" if path else BASE
    return any(entry[0].partition("@")[0] == name for entry in (node.meta.get("nn_module_stack") or {}).values())


def base_path(path: str) -> str:
    """A module's path relative to the base, from torch's stack of the modules that run; empty outside the base."""
    path = path.partition("@")[0]
    return path.removeprefix(BASE).removeprefix(".") if path.partition(".")[0] == BASE else ""


class _Paths:
    """Module paths of weights: the module that ran the op if it owns the tensor, else the tensor's own name.

    A tied weight has one name in the graph and several owners, so the name does not identify the owner.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def of(self, op: fx.Node, weight: fx.Node) -> str:
        path = module_path(op)
        name = own_name(self.graph.base, path, self.graph.get(str(weight.target)))
        if name is None:
            return str(weight.target).removeprefix(f"{BASE}.").removesuffix(".weight")
        return path if name == "weight" else f"{path}.{name}".removeprefix(".")


def own_name(base: nn.Module, path: str, tensor: torch.Tensor) -> str | None:
    """Return the name of a parameter in the module at a path; None if that module does not have it."""
    owner = module_at(base, path)
    return None if owner is None else next((name for name, own in owner._parameters.items() if own is tensor), None)
