"""Accounts: what becomes of each tensor of an adapter's file. None is dropped: it is taken, or the file is refused.

A tensor is *taken* into the adapter; it is a *repeat* of what the base or the file has anyway; or it is *unused*: of a
module that is proven never to run, so that it changes nothing in HF PEFT either. That is kept, and saved again.
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
    """Names that are not taken and whose tensors say nothing new: the base's own, or those under another name.

    HF PEFT writes the frozen weight of an adapted embedding, with `bias="all"` the bias of a saved module thrice, the
    rows of trained tokens once for each module that has the tensor, and so RandLoRA's bases, which all modules share.
    """
    return {
        name
        for name in weights.names.keys() - set(taken)
        if any(_equal(weights[name], t) for t in _originals(weights, name, taken, base))
    }


def _originals(weights: Weights, name: str, taken: Collection[str], base: nn.Module) -> Iterator[Tensor]:
    """What a tensor may be a copy of."""
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
            leaf = tail.rpartition(".")[2]  # behind `modules_to_save.` is the adapter's name
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
    """Those of these names that are of a module that no call of the base runs."""
    paths = {name: module_of(name, marks) for name in names}
    idle = {path for path in set(paths.values()) if path not in names and never_runs(path, base, sites)}
    return {name for name, path in paths.items() if path in idle}
