"""Converts a call's arguments to named inputs of a graph, and back."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError
from peftfx.graph.graph import path_name


@functools.lru_cache(64)
def _parameters(forward: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def named_arguments(base: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of a call of `base` by name, without those that are None.

    Numbers for `**kwargs`, such as `num_items_in_batch`, become tensors: they change from call to call, and would
    otherwise be constants of the graph.
    """
    parameters = _parameters(type(base).forward)
    plain = [n for n, p in list(parameters.items())[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(plain):
        raise TypeError(f"forward takes {len(plain)} positional arguments, {len(args)} were given")
    named = {**dict(zip(plain, args, strict=False)), **kwargs}
    values = {name: v for name, v in named.items() if v is not None}
    for name, value in values.items():
        if name not in parameters and isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = torch.tensor(value)
    return values


def nested(case: Mapping[str, Tensor], example: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments as the model takes them: nested inputs in their places, constants as in the example."""
    leaves, spec = pytree.tree_flatten_with_path(dict(example))
    named = {path_name(path) for path, _ in leaves}
    if set(case) - named:
        return dict(case)
    values = [case.get(path_name(path), leaf) for path, leaf in leaves]
    return dict(pytree.tree_unflatten(values, spec))


def named_tensors(example: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the tensors of a call's arguments, at any depth, by the names of the graph's inputs."""
    leaves, _ = pytree.tree_flatten_with_path(dict(example))
    return {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def refuse_hidden_tensors(leaves: Sequence[tuple[pytree.KeyPath, object]]) -> None:
    """Refuse an argument that is an object of a class that torch does not know, and holds tensors.

    A graph would have these tensors as constants.

    Raises:
        PeftfxError: there is one.
    """
    for path, leaf in leaves:
        held = {} if isinstance(leaf, (Tensor, nn.Module, type)) else getattr(leaf, "__dict__", {})
        if any(isinstance(value, Tensor) for value in held.values()):
            kind = type(leaf).__name__
            what = f"this argument is an object of the class {kind}, whose tensors torch.export does not know"
            plain = "pass its tensors as arguments of their own, or in a dict"
            known = f"call torch.export.register_dataclass({kind}) first, or {plain}"
            raise PeftfxError(what, path_name(path), known if dataclasses.is_dataclass(leaf) else plain)
