"""Stamping: a capture traces two layers of each kind, and writes the other layers as copies of the second.

Most of a capture's time goes to the code of the layers, which is run once for each layer on tensors without data.
Layers that differ only in their weights give equal nodes. So two layers of a kind are traced. If their nodes are equal
but for weights and inputs, each further layer of that kind is written as a copy. Layers that differ are traced.

Layers are of one kind if they have the same class, equal attributes, weights of equal shapes, and equal arguments: see
`layer_kinds.py`. A layer is always traced if its code writes something that the kind does not describe, or computes
with the layer's number, such as `1 / (layer + 1)`; `Number` records such uses.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.graph.capturing.layer_kinds import Kind, LayerCall, Unknown, described, layers_of
from peftfx.graph.capturing.layer_numbers import ModulesOf, numbered
from peftfx.telling import tell_share

Forward = Callable[..., object]
"""The forward of a class of modules: takes the module, and the arguments."""
_TRACED = 0.4  #: the share of a capture's time in which the layers run; in the rest torch.export checks the nodes


@contextmanager
def stamped(model: nn.Module, modules: ModulesOf) -> Iterator[None]:
    """Trace two layers of each kind in this thread's captures of `model`, and copy the others, inside the context.

    Args:
        model: the model that is captured.
        modules: a function that gives the modules of a layer that tell its kind. What adapters have put beside the
            base's own modules does not run in a capture of the base, and differs from layer to layer: it is left out.
    """
    with layers_run_by(_Stamper(layers_of(model), modules)):
        yield


class RunsLayers(Protocol):
    """Runs the layers of a model, which are `layers`, by the identity of their attributes."""

    @property
    def layers(self) -> Mapping[int, nn.Module]:
        """The layers."""

    def __call__(self, module: nn.Module, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Run a module of a layer's class, a layer or another; `original` is the class's forward."""


@contextmanager
def layers_run_by(runner: RunsLayers) -> Iterator[None]:
    """Let `runner` run each call of its layers inside the context."""
    with ExitStack() as stack:
        for kind in {type(layer) for layer in runner.layers.values()}:
            stack.enter_context(_replaced(kind, runner))
        yield


@contextmanager
def _replaced(kind: type[nn.Module], runner: RunsLayers) -> Iterator[None]:
    own, original = "forward" in vars(kind), kind.forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        return runner(self, original, args, kwargs)

    kind.forward = forward
    try:
        yield
    finally:
        if own:
            kind.forward = original
        else:
            del kind.forward


@dataclass
class _Traced:
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


@dataclass
class _Stamper:
    """Runs layers when the model calls them. Modules are identified by their attributes, as torch may show proxies."""

    layers: Mapping[int, nn.Module]
    modules: ModulesOf
    kinds: dict[object, Kind[_Traced]] = field(default_factory=dict)
    held: list[object] = field(default_factory=list)  #: objects whose id is in a key, kept alive
    thread: int = field(default_factory=threading.get_ident)
    run: set[int] = field(default_factory=set)  #: the layers that have run

    def __call__(self, module: nn.Module, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        result = self._run(module, original, args, kwargs)
        if id(vars(module)) in self.layers and id(vars(module)) not in self.run:
            self.run.add(id(vars(module)))
            done, total = len(self.run), len(self.layers)
            tell_share(f"{done} of {total} layers", _TRACED * done / total)
        return result

    def _run(self, module: nn.Module, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        layer = self.layers.get(id(vars(module)))
        mode = proxy_tensor.get_proxy_mode() if threading.get_ident() == self.thread else None
        if layer is None or mode is None or not getattr(mode.tracer, "module_stack", None):
            return original(module, *args, **kwargs)
        tracer: Any = mode.tracer
        key, (path, _) = next(reversed(tracer.module_stack.items()))
        try:
            if key != path:  # the layer runs again
                raise Unknown
            call = described(layer, args, kwargs, lambda tensor: _node(tracer, tensor), self.held, self.modules)
            kind = self.kinds.setdefault(call.key, Kind())
        except Unknown:
            return original(module, *args, **kwargs)
        if kind.ready and kind.last is not None:
            return _copied(tracer, kind.last, call, path)
        if not kind.left:
            return original(module, *args, **kwargs)
        run = functools.partial(original, module, *args, **kwargs)
        result, traced = _trace(tracer, layer, call, path, run, self.modules)
        kind.note(traced)
        return result


def _node(tracer: Any, tensor: Tensor) -> fx.Node | None:
    found = tracer.tensor_tracker.get(tensor)
    return None if found is None else found.proxy.node


def _trace(
    tracer: Any, layer: nn.Module, call: LayerCall, path: str, run: Callable[[], object], modules: ModulesOf
) -> tuple[object, _Traced | None]:
    """Run a layer, and return its result and what it left in the graph; None if copied nodes would not be enough."""
    last, counts = tracer.graph._root.prev, dict(tracer.num_calls)
    with numbered(layer, modules) as numbers:
        held = call.held(layer, modules)
        result = run()
        try:
            changes = call.changes(held)
        except Unknown:
            return result, None
    try:
        if any(number.used for number in numbers):
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
) -> _Traced:
    if any("unbacked_bindings" in node.meta or node.op not in ("call_function", "get_attr") for node in made):
        raise Unknown
    nodes = [node for node in made if not _is_size(node)]
    places: dict[fx.Node, tuple[str, object]] = {node: ("entry", label) for node, label in call.labels.items()}
    places |= {node: ("node", i) for i, node in enumerate(nodes)}
    leaves, spec = pytree.tree_flatten((result, dict(changes)), is_leaf=call.is_cache)
    again = {
        label: node
        for label, tensor in call.entries.items()
        if (node := _node(tracer, tensor)) is not None and node is not call.nodes[label]
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
    ends = {id(leaf): node for leaf in leaves if isinstance(leaf, Tensor) and (node := _node(tracer, leaf)) is not None}
    return _Traced(call, nodes, places, leaves, spec, again, text, calls, path, ends)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.types.py_sym_types)


def _text(tracer: Any, node: fx.Node, places: Mapping[fx.Node, tuple[str, object]]) -> object:
    """Return a node's description without its name."""
    if node.op == "get_attr":  # a constant that torch made from a tensor in the code
        value = getattr(tracer.root, str(node.target), None)
        if type(value) is not Tensor:
            raise Unknown
        return "constant", value.dtype, value.shape, tuple(value.flatten().tolist())

    def place(value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        return ("size", value.meta["val"].node.expr) if _is_size(value) else places.get(value, ("outer", value.name))

    arguments = pytree.tree_map_only(fx.Node, place, (node.args, node.kwargs))
    return node.target, repr(arguments), pytree.tree_map_only(Tensor, LayerCall.shape, node.meta.get("val"))


def _exit(tracer: Any, value: object, call: LayerCall, places: Mapping[fx.Node, tuple[str, object]]) -> object:
    if not isinstance(value, Tensor):
        return call.value(value)
    if (label := call.label(value)) is not None:
        return "entry", label
    node = _node(tracer, value)
    if node is None or places.get(node, ("",))[0] != "node":
        raise Unknown
    return places[node], LayerCall.shape(value)


def _copied(tracer: Any, traced: _Traced, call: LayerCall, path: str) -> object:
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
            key: (name, str(kind) if isinstance(kind, str) else _name(kind)) for key, (name, kind) in outer.items()
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
    result, changes = pytree.tree_unflatten(leaves, traced.spec)
    call.change(changes)
    return result


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _again(tracer: Any, leaf: object, traced: _Traced, call: LayerCall, copies: Mapping[fx.Node, fx.Node]) -> object:
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
                made = _Result.apply(leaf)  # type: ignore[no-untyped-call]
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
