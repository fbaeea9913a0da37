"""Stamping: a capture traces two layers of each kind, and writes the other layers as copies of the second.

Most of a capture's time goes to the code of the layers, which is run once for each layer on tensors without data.
Layers that differ only in their weights give equal nodes. So two layers of a kind are traced. If their nodes are equal
but for weights and inputs, each further layer of that kind is written as a copy. Layers that differ are traced.

Layers are of one kind if they have the same class, equal attributes, weights of equal shapes, and equal arguments: see
`layer_kinds.py`. A layer is always traced if its code writes something that the kind does not describe, or uses the
layer's number otherwise than as a place in lists and caches, as in `1 / (layer + 1)`: see `layer_numbers.py`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.fx.experimental import proxy_tensor

from peftfx.graph.capturing.layer_kinds import Kind, Unknown, described, layers_of
from peftfx.graph.capturing.layer_numbers import ModulesOf
from peftfx.graph.capturing.traced_layers import TracedLayer, copied_layer, node_of, qualified_name, traced_layer
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

    @functools.wraps(original)
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
class _Stamper:
    """Runs layers when the model calls them. Modules are identified by their attributes, as torch may show proxies."""

    layers: Mapping[int, nn.Module]
    modules: ModulesOf
    kinds: dict[object, Kind[TracedLayer]] = field(default_factory=dict)
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
        key, (path, kind_of_top) = next(reversed(tracer.module_stack.items()))
        try:
            if key != path:  # the layer runs again
                raise Unknown
            if kind_of_top not in (type(layer), qualified_name(type(layer))):  # its `forward` is called, not the layer
                raise Unknown
            call = described(layer, args, kwargs, lambda tensor: node_of(tracer, tensor), self.held, self.modules)
            kind = self.kinds.setdefault(call.key, Kind())
        except Unknown:
            return original(module, *args, **kwargs)
        if kind.ready and kind.last is not None:
            return copied_layer(tracer, kind.last, call, path)
        if not kind.left:
            return original(module, *args, **kwargs)
        run = functools.partial(original, module, *args, **kwargs)
        result, traced = traced_layer(tracer, layer, call, path, run, self.modules)
        kind.note(traced)
        return result
