"""One capture for all models of one structure: half of the tests' captures are of a structure that was seen before.

A graph has no weights of its own: it reads the model's. So what a capture gives depends on the model's modules, their
attributes, the names, shapes and types of its tensors, and the call. Where all of these are equal, a remembered graph
is linked to the new model. `pytest --capture-each` captures each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from peftfx.bases.guests import GUESTS, is_guest, own_class, own_modules, own_parameters
from peftfx.graph.capturing.described_values import is_only_code
from peftfx.graph.capturing.sides import Sides
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.lazy_weights import Stored
from peftfx.graph.linking import link
from peftfx.model.graphs.fingerprints import value_key
from peftfx.patterns.pattern import known_patterns
from peftfx.quantisation.coded import Coded
from peftfx.views import capture
from peftfx.views.view import Axes

_APART = ("_parameters", "_buffers", "_modules", "name_or_path")
_UNREAD = ("_name_or_path", "transformers_version", "architectures", "dtype")  #: of a config: where a model came from


own_capture = capture._captured  #: what captures each time


def remembering() -> Callable[..., Graph]:
    """Return what captures each structure once."""
    known = dict[object, tuple[Graph, list[str]]]()

    def captured(
        wrapper: capture._Flat,
        tensors: Mapping[str, Tensor],
        axes: Axes,
        sides: Sides,
        lengths: Mapping[str, int],
        *,
        stamp: bool,
    ) -> Graph:
        model = wrapper.get_submodule(BASE)
        key = _key(model, wrapper, tensors, axes, lengths, stamp)
        if key is not None and key in known:
            graph, sizes = known[key]
            if _sizes(graph) == sizes:
                return _linked(graph, model)
        graph = own_capture(wrapper, tensors, axes, sides, lengths, stamp=stamp)
        if key is not None and not sides.made:  # decisions are those of the example's values
            known[key] = _linked(graph, None), _sizes(graph)
        return graph

    return captured


def _linked(graph: Graph, model: nn.Module | None) -> Graph:
    """Return a copy of a graph that reads the tensors of this model."""
    copy = graph.clone()
    holders = {name: child for name, child in copy.module.named_children() if name != BASE}
    module = link(copy.module.graph, holders if model is None else {BASE: model, **holders})
    return dataclasses.replace(copy, module=module)


def _key(
    model: nn.Module,
    wrapper: capture._Flat,
    tensors: Mapping[str, Tensor],
    axes: Axes,
    lengths: Mapping[str, int],
    stamp: bool,
) -> object:
    """Return all that a capture depends on, or None for a model or a call that is captured each time."""
    try:
        given = tuple((name, t.dtype, tuple(t.shape), str(t.device), type(t)) for name, t in tensors.items())
        leaves = tuple(value_key(leaf) for leaf in wrapper.leaves if not isinstance(leaf, Tensor))
        call = (given, leaves, wrapper.spec, wrapper.call, wrapper.entry, wrapper.training, stamp)
        asked = (tuple((name, tuple(own or ())) for name, own in axes.items()), tuple(lengths.items()))
        world = (torch.get_default_dtype(), torch.is_grad_enabled(), known_patterns())
        key = (_modules_key(model), _tensors_key(model), call, asked, world)
        hash(key)
    except (_Unknown, TypeError):
        return None
    return key


class _Unknown(Exception):
    """A model has what may matter to a capture, and cannot be compared."""


def _modules_key(model: nn.Module) -> object:
    """Return what a model's modules are, and which of them are one module in two places."""
    first = {id(module): path for path, module in own_modules(model)}
    every = own_modules(model, remove_duplicate=False)
    return tuple((path, first[id(module)], _module_key(module)) for path, module in every)


def _module_key(module: nn.Module) -> object:
    own = {name: value for name, value in vars(module).items() if "state_dict" not in name and name not in _APART}
    if any(value for name, value in own.items() if name.endswith("_hooks")):
        raise _Unknown
    config = own.get("config")
    if isinstance(config, PreTrainedConfig):
        own["config"] = {name: value for name, value in vars(config).items() if name not in _UNREAD}
    own = {name: _kinds(value) for name, value in own.items()}
    kind = own_class(module)
    return kind, kind.forward, tuple(name for name in vars(module)["_modules"] if name != GUESTS), value_key(own)


def _kinds(value: object) -> object:
    """Return the classes of modules that are only code, which transformers keeps by name; any other value itself."""
    if isinstance(value, dict) and all(isinstance(item, nn.Module) and is_only_code(item) for item in value.values()):
        return {name: type(item) for name, item in value.items()}
    return value


def _tensors_key(model: nn.Module) -> object:
    """Return what a model's tensors are, and which of them are one tensor in two places."""
    buffers = ((n, b) for n, b in model.named_buffers(remove_duplicate=False) if not is_guest(n))
    first, found = dict[int, str](), []
    for name, tensor in (*own_parameters(model, remove_duplicate=False), *buffers):
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer, Stored, Coded) or tensor.device.type != "cpu":
            raise _Unknown
        memory = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
        found.append((name, first.setdefault(id(tensor), name), *memory, _late(tensor)))
    return tuple(found)


def _late(tensor: Tensor) -> object:
    """Return what is read in place of a tensor whose values are made by each operator that reads them."""
    if isinstance(tensor, Coded):
        return tensor.codes.format, tensor.codes.shape
    return tensor.source.dtype if isinstance(tensor, Stored) else None


def _sizes(graph: Graph) -> list[str]:
    """Return what torch knows of the sizes of a graph's inputs: a method that failed may have fixed one."""
    return [str(node.meta["val"].shape) for node in graph.module.graph.find_nodes(op="placeholder")]
