"""Equal layers in a dry run: two layers of a kind run, and the others give tensors of the same shapes.

A dry run is for the shapes of what a model keeps. Layers of one kind (see `layer_kinds.py`) differ only in weights, so
their results have the same shapes. A layer runs, as in a capture, if its code writes something that the kind does not
describe, uses the layer's number otherwise than as a place, or returns a tensor whose size is not known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.graph.capturing.layer_kinds import Kind, LayerCall, Unknown, described, layers_of
from peftfx.graph.capturing.layer_numbers import ModulesOf, noting_uses
from peftfx.graph.capturing.stamping import Forward, layers_run_by


@contextmanager
def equal_layers_run_twice(model: nn.Module, modules: ModulesOf) -> Iterator[None]:
    """Run two layers of each kind in this thread's calls of `model` on fake tensors, inside the context.

    Args:
        model: the model.
        modules: a function that gives the modules of a layer that tell its kind.
    """
    with layers_run_by(_Layers(layers_of(model), modules)):
        yield


@dataclass(frozen=True)
class _Seen:
    """What one call of a layer returned and wrote into its caches, and a description of it without weights."""

    call: LayerCall
    leaves: list[object]
    spec: pytree.TreeSpec
    text: object

    @staticmethod
    def of(call: LayerCall, result: object, changes: dict[str, object]) -> _Seen:
        leaves, spec = pytree.tree_flatten((result, changes), is_leaf=call.is_cache)
        return _Seen(call, leaves, spec, (str(spec), [_text(call, leaf) for leaf in leaves]))

    def again(self, call: LayerCall) -> object:
        """Return the result of an equal layer's `call`, and write into its caches."""
        made: dict[int, object] = {}
        for leaf in self.leaves:
            if id(leaf) not in made:
                made[id(leaf)] = self._again(leaf, call)
        result, changes = pytree.tree_unflatten([made[id(leaf)] for leaf in self.leaves], self.spec)
        call.change(changes)
        return result

    def _again(self, leaf: object, call: LayerCall) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if (label := self.call.label(leaf)) is not None:
            return call.entries[label]
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _text(call: LayerCall, leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return call.value(leaf)
    if not all(type(size) is int for size in (*leaf.shape, *leaf.stride())):
        raise Unknown
    return LayerCall.shape(leaf), call.label(leaf)


@dataclass
class _Layers:
    """Runs layers when the model calls them. Modules are identified by their attributes."""

    layers: dict[int, nn.Module]
    modules: ModulesOf
    kinds: dict[object, Kind[_Seen]] = field(default_factory=dict)
    held: list[object] = field(default_factory=list)  #: objects whose id is in a key, kept alive
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, module: nn.Module, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        layer = self.layers.get(id(vars(module)))
        if layer is None or threading.get_ident() != self.thread:
            return original(module, *args, **kwargs)
        try:
            call = described(layer, args, kwargs, lambda tensor: tensor, self.held, self.modules)
        except Unknown:
            return original(module, *args, **kwargs)
        kind = self.kinds.setdefault(call.key, Kind())
        if kind.ready and kind.last is not None:
            return kind.last.again(call)
        if not kind.left:
            return original(module, *args, **kwargs)
        with noting_uses(layer, self.modules, call) as uses:
            held = call.held(layer, self.modules)
            result = original(module, *args, **kwargs)
            try:
                changes = call.changes(held)
                if uses:
                    raise Unknown
                kind.note(_Seen.of(call, result, changes))
            except Unknown:
                kind.note(None)
        return result
