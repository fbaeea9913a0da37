"""Traced layers: what a layer left in a capture's graph, compared with another layer, and copied for a further one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.graph.capturing.copied_memory import memories_of_copies, refuse_views
from peftfx.graph.capturing.layer_kinds import LayerCall, Unknown
from peftfx.graph.capturing.layer_numbers import ModulesOf, noting_uses
from peftfx.graph.written import MEMORY


@dataclass
class TracedLayer:
    """The nodes that a layer left in the graph, and what is needed to copy them.

    Attributes:
        call: the layer's call.
        nodes: the nodes that it made, except those that compute sizes.
        places: the index of each node in `nodes`, and the entry of each node that existed before.
        exits: the tensors and other values that it returned or put into its cache.
        again: the new nodes of entries that got another node: a cast to the same dtype returns its argument with a new
            node.
        text: a description of all this without names, which is equal for two layers whose nodes are equal.
        calls: the number of calls of each module in the layer, by the module's path in the layer.
        path: the layer's path.
    """

    call: LayerCall
    nodes: list[fx.Node]
    places: dict[fx.Node, tuple[str, object]]
    exits: list[object]
    spec: pytree.TreeSpec
    again: dict[object, fx.Node]
    text: object
    calls: dict[str, int]
    path: str
    ends: dict[int, fx.Node]


def traced_layer(
    tracer: Any, layer: nn.Module, call: LayerCall, path: str, run: Callable[[], object], modules: ModulesOf
) -> tuple[object, TracedLayer | None]:
    """Run a layer, and return its result and what it left in the graph; None if copied nodes would not be enough."""
    last, counts = tracer.graph._root.prev, dict(tracer.num_calls)
    with noting_uses(layer, modules, call) as uses:
        held = call.held(layer, modules)
        result = run()
        try:
            changes = call.changes(held)
        except Unknown:
            return result, None
    try:
        if uses:
            raise Unknown
        made = []
        node = last.next
        while node is not tracer.graph._root:
            made.append(node)
            node = node.next
        return result, _read(tracer, call, made, result, changes, counts, path)
    except Unknown:
        return result, None


def _read(
    tracer: Any,
    call: LayerCall,
    made: list[fx.Node],
    result: object,
    changes: Mapping[str, object],
    counts: Mapping[str, int],
    path: str,
) -> TracedLayer:
    if any("unbacked_bindings" in node.meta or node.op not in ("call_function", "get_attr") for node in made):
        raise Unknown
    nodes = [node for node in made if not _is_size(node)]
    places: dict[fx.Node, tuple[str, object]] = {node: ("entry", label) for node, label in call.labels.items()}
    places |= {node: ("node", i) for i, node in enumerate(nodes)}
    leaves, spec = pytree.tree_flatten((result, dict(changes)), is_leaf=call.is_cache)
    again = {
        label: node
        for label, tensor in call.entries.items()
        if (node := node_of(tracer, tensor)) is not None and node is not call.nodes[label]
    }
    if any(places.get(node, ("",))[0] != "node" for node in again.values()):
        raise Unknown
    text = (
        [_text(tracer, node, places) for node in nodes],
        spec,
        [_exit(tracer, leaf, call, places) for leaf in leaves],
        {label: places[node] for label, node in again.items()},
    )
    calls = {
        name[len(path) :]: count - counts.get(name, 0)
        for name, count in tracer.num_calls.items()
        if name.startswith(f"{path}.") and count != counts.get(name, 0)
    }
    refuse_views(call, leaves)
    ends = {
        id(leaf): node for leaf in leaves if isinstance(leaf, Tensor) and (node := node_of(tracer, leaf)) is not None
    }
    return TracedLayer(call, nodes, places, leaves, spec, again, text, calls, path, ends)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.types.py_sym_types)


def node_of(tracer: Any, tensor: Tensor) -> fx.Node | None:
    found = tracer.tensor_tracker.get(tensor)
    return None if found is None else found.proxy.node


def _text(tracer: Any, node: fx.Node, places: Mapping[fx.Node, tuple[str, object]]) -> object:
    """Return a node's description without its name."""
    if node.op == "get_attr":  # a constant that torch made from a tensor in the code
        value = getattr(tracer.root, str(node.target), None)
        if type(value) is not Tensor:
            raise Unknown
        with _disable_current_modes():  # in the capture's own mode, its numbers would be symbols
            return "constant", value.dtype, value.shape, tuple(value.flatten().tolist())

    def place(value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        if _is_size(value):
            return "size", value.meta["val"].node.expr
        if value not in places:  # a tensor that the layer has from elsewhere: another layer may find another there
            raise Unknown
        return places[value]

    arguments = pytree.tree_map_only(fx.Node, place, (node.args, node.kwargs))
    return node.target, repr(arguments), pytree.tree_map_only(Tensor, LayerCall.shape, node.meta.get("val"))


def _exit(tracer: Any, value: object, call: LayerCall, places: Mapping[fx.Node, tuple[str, object]]) -> object:
    if not isinstance(value, Tensor):
        return call.value(value)
    if (label := call.label(value)) is not None:
        return "entry", label
    node = node_of(tracer, value)
    if node is None or places.get(node, ("",))[0] != "node":
        raise Unknown
    return places[node], LayerCall.shape(value)


def copied_layer(tracer: Any, traced: TracedLayer, call: LayerCall, path: str) -> object:
    """Write a layer as a copy of a traced layer, and return the layer's result."""
    copies: dict[fx.Node, fx.Node] = {}
    outer = tracer.module_stack

    def moved(name: str) -> str:
        own, mark, number = name.partition("@")
        return path + own[len(traced.path) :] + mark + number

    def find(node: fx.Node) -> fx.Node:
        kind, label = traced.places.get(node, ("", None))
        return call.nodes[label] if kind == "entry" else copies.get(node, node)

    for node in traced.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), find)
        copy = copies[node] = tracer.graph.create_node(node.op, node.target, args, kwargs)
        copy.meta = dict(node.meta)
        inner = list(node.meta["nn_module_stack"].items())[len(outer) :]
        stack = {
            key: (name, str(kind) if isinstance(kind, str) else qualified_name(kind))
            for key, (name, kind) in outer.items()
        }
        stack |= {moved(key): (moved(name), kind) for key, (name, kind) in inner}
        copy.meta["nn_module_stack"] = stack
    for name, count in traced.calls.items():
        tracer.num_calls[path + name] = tracer.num_calls.get(path + name, 0) + count
    for label, node in traced.again.items():
        tracer.tensor_tracker[call.entries[label]].proxy = fx.Proxy(copies[node], tracer)
    fresh: dict[int, object] = {}
    leaves = []
    for leaf in traced.exits:
        if id(leaf) not in fresh:
            fresh[id(leaf)] = _again(tracer, leaf, traced, call, copies)
        leaves.append(fresh[id(leaf)])
    exits = [(leaf, fresh[id(leaf)]) for leaf in traced.exits]
    entries = [(node, call.nodes[label]) for label, node in traced.call.nodes.items()]
    for copy, memory in memories_of_copies(copies, exits, entries):
        copy.meta[MEMORY] = memory
    result, changes = pytree.tree_unflatten(leaves, traced.spec)
    call.change(changes)
    return result


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _again(
    tracer: Any, leaf: object, traced: TracedLayer, call: LayerCall, copies: Mapping[fx.Node, fx.Node]
) -> object:
    """Return the value that a copied layer returns in place of the traced layer's `leaf`."""
    if not isinstance(leaf, Tensor):
        return leaf
    if (label := traced.call.label(leaf)) is not None:
        return call.entries[label]
    node = copies[traced.ends[id(leaf)]]
    # without functions' modes: in a capture, one writes a node for each change of grad mode
    with torch._C.DisableTorchFunction(), _disable_current_modes(), leaf.fake_mode:  # type: ignore[attr-defined]
        if leaf.requires_grad:
            with torch.enable_grad():
                made = _Result.apply(leaf)
        else:
            made = _empty_as(leaf)
    proxy_tensor.track_tensor(made, fx.Proxy(node, tracer), constant=None, tracer=tracer)
    return made


def _empty_as(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Result(torch.autograd.Function):
    """A tensor without values that is no leaf of autograd: code may write in place into it."""

    @staticmethod
    def forward(ctx: Any, like: Tensor) -> Tensor:
        return _empty_as(like)
