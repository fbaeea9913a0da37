"""The use of each tensor of an adapter's file: every tensor is accounted for, or the file is refused.

A tensor is *taken* into the adapter; or it is a *repeat* of a tensor of the base or of the file; or it is *unused*: the
tensor of a module that provably never runs, or whose results reach no output of this call. Such a tensor changes
nothing in HF PEFT either. Unused tensors are kept, and saved again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from peftfx.adapters.files.names import module_of
from peftfx.contract.override import TOKENS
from peftfx.graph.places import has_module
from peftfx.rules.peft_files import Weights
from peftfx.rules.unplaced import never_runs
from peftfx.sites.sites import Sites

_WRAPPERS = (".modules_to_save.", ".original_module.")


def repeats(weights: Weights, taken: Collection[str], base: nn.Module) -> set[str]:
    """Return the names of tensors that are not taken and only repeat a tensor of the base or of the file.

    HF PEFT repeats these tensors: the frozen weight of an adapted embedding; with `bias="all"` the bias of a saved
    module, three times; the rows of trained tokens, once for each module that has the tensor; and RandLoRA's bases,
    once for each module, although all modules share them.
    """
    return {
        name
        for name in weights.names.keys() - set(taken)
        if any(_equal(weights[name], t) for t in _originals(weights, name, taken, base))
    }


def _originals(weights: Weights, name: str, taken: Collection[str], base: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that the tensor `name` may be a copy of."""
    if name.endswith(f".{TOKENS}"):
        same = (n for n in taken if n.endswith(f".{TOKENS}") and _is_tied(base, _owner(n), _owner(name)))
        yield from (weights[n] for n in same)
    leaf = name.rpartition(".")[2]
    yield from (weights[n] for n in taken if n == f"base_model.{leaf}" and n in weights.names)
    if name.endswith((".base_layer.weight", ".base_layer.bias")):
        yield from _tensor(base, name.replace(".base_layer.", "."))
    for wrapper in _WRAPPERS:
        head, found, tail = name.partition(wrapper)
        if found:
            leaf = tail.rpartition(".")[2]  # the adapter's name comes after `modules_to_save.`
            plain = f"{head}.{leaf}"
            yield from [weights[plain]] if plain in weights.names else []
            yield from _tensor(base, plain)


def _owner(name: str) -> str:
    return name.removesuffix(f".{TOKENS}")


def _is_tied(base: nn.Module, one: str, other: str) -> bool:
    weights = [getattr(base.get_submodule(path), "weight", None) for path in (one, other) if has_module(base, path)]
    return len(weights) == 2 and weights[0] is not None and weights[0] is weights[1]


def _tensor(base: nn.Module, name: str) -> Iterator[Tensor]:
    path, _, leaf = name.rpartition(".")
    try:
        value = getattr(base.get_submodule(path), leaf)
    except AttributeError:
        return
    if isinstance(value, Tensor):
        yield value.detach()


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value.to(other.device, other.dtype), other)


def unused(names: Collection[str], marks: Collection[str], base: nn.Module, sites: Sites) -> set[str]:
    """Return the names of tensors whose module no call runs, or whose module's results reach no output of this call."""
    paths = {name: module_of(name, marks) for name in names}
    unread = sites.unread
    idle = {p for p in set(paths.values()) if p not in names and (p in unread or never_runs(p, base, sites))}
    return {name for name, path in paths.items() if path in idle}
