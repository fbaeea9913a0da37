"""The class `BaseWriter`: writes tensors into a base's modules, for good or so that the old ones can be put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftfx.adapters.deferred import Deferred
from peftfx.contract.placement import owner_of
from peftfx.graph.lazy_weights import Stored
from peftfx.graph.places import has_module, twin
from peftfx.sharding.parts import is_part, overwrite

_NOTHING = object()
TensorHolder = tuple[nn.Module, str]
"""A module that holds a tensor, and the tensor's name in it."""


class Ledger:
    """The dict entries that were overwritten, with their old values: the same objects, not copies."""

    def __init__(self) -> None:
        self._was: list[tuple[dict[str, Any], str, object]] = []

    def write(self, table: dict[str, Any], key: str, value: object) -> None:
        """Write the entry `key` of a dict, and remember the entry's old value."""
        self._was.append((table, key, table.get(key, _NOTHING)))
        table[key] = value

    def swap(self) -> None:
        """Exchange the old values and the written ones; a second call exchanges them again."""
        swapped = []
        for table, key, value in reversed(self._was):
            swapped.append((table, key, table.get(key, _NOTHING)))
            if value is _NOTHING:
                del table[key]
            else:
                table[key] = value
        self._was = swapped


class BaseWriter:
    """A writer of parameters, buffers and attributes into the modules of one base.

    Args:
        base: the base, as a torch module.
        ledger: keeps the old values, and each tensor written is a new tensor. Without a ledger tensors are overwritten.
    """

    def __init__(self, base: nn.Module, ledger: Ledger | None = None) -> None:
        self.base, self.ledger = base, ledger
        self._holders: dict[int, list[TensorHolder]] | None = None

    def assign(self, name: str, value: Tensor, *, untie: bool, others: Sequence[str] = ()) -> int:
        """Write a parameter or a buffer of the base, and return its size in bytes.

        Args:
            name: the dotted name of the parameter or buffer.
            value: the new value; it may be the present tensor itself.
            untie: whether this module gets a tensor of its own if other modules share the present tensor.
            others: further names of the present tensor, which are tied with `name` in any case.
        """
        module, leaf = owner_of(self.base, name)
        old = getattr(module, leaf, None)
        fixed = isinstance(value, Deferred) or isinstance(old, Stored | Deferred)  # not writable, or without values yet
        fixed = fixed or (self.ledger is not None and value is not old)
        if isinstance(old, Tensor) and not fixed and (not untie or is_part(old)) and old.shape == value.shape:
            if old is not value:
                overwrite(old, value)
            return value.numel() * value.element_size()
        new = value.detach().clone()
        if leaf not in module._buffers:
            new = nn.Parameter(new, requires_grad=bool(isinstance(old, Tensor) and old.requires_grad))
        held = self._holders_by_id()
        tied = [(module, leaf), *(owner_of(self.base, other) for other in others)]
        holders = tied if untie or old is None else held.pop(id(old))
        for holder, own in holders:
            self.put(holder._buffers if own in holder._buffers else holder._parameters, own, new)
        if untie and old is not None:
            held[id(old)] = [other for other in held.get(id(old), ()) if other not in tied]
        held[id(new)] = holders
        return value.numel() * value.element_size()

    def _holders_by_id(self) -> dict[int, list[TensorHolder]]:
        """Return the modules that hold each parameter and buffer, by its id. `assign` keeps them up to date."""
        if self._holders is None:
            self._holders = {}
            for module in self.base.modules():
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    self._holders.setdefault(id(tensor), []).append((module, name))
        return self._holders

    def put(self, table: dict[str, Any], key: str, value: object) -> None:
        """Write an entry of a dict that belongs to a module, such as its parameters or attributes."""
        if self.ledger is None:
            table[key] = value
        else:
            self.ledger.write(table, key, value)

    def untie_configs(self) -> None:
        """Set `tie_word_embeddings` to False in the configs of the base.

        Nothing then ties other tensors either when the model is loaded again, such as the bias of BERT's head. So each
        of these modules gets a tensor of its own.
        """
        self._holders = None
        for model in [m for m in self.base.modules() if isinstance(m, PreTrainedModel)]:
            for name, source in model.get_expanded_tied_weights_keys().items():
                (module, leaf), (other, at) = owner_of(model, name), owner_of(model, source)
                value = module._parameters.get(leaf)
                if value is None or module is other or value is not other._parameters.get(at):
                    continue
                if not isinstance(value, Stored | Deferred):
                    self.put(module._parameters, leaf, nn.Parameter(value.detach().clone(), value.requires_grad))
        for owner in self.base.modules():
            config = getattr(owner, "config", None)
            if hasattr(config, "tie_word_embeddings"):
                self.put(vars(config), "tie_word_embeddings", False)

    def part(self, changed: Iterable[str], called: Sequence[str]) -> None:
        """Copy each module in `changed` that the base also calls by another path, so that only one path changes.

        Under the other path the module does not change, or changes in another way.
        """
        self._holders = None
        names: dict[int, list[str]] = {}
        for path in (p for p in called if has_module(self.base, p)):
            names.setdefault(id(self.base.get_submodule(path)), []).append(path)
        for path in sorted(p for p in changed if has_module(self.base, p)):
            for other in names.get(id(self.base.get_submodule(path)), ()):
                if other != path:
                    self._part_from(path.split("."), other.split("."))

    def _part_from(self, path: Sequence[str], other: Sequence[str]) -> None:
        """Copy the first module that both paths run through after their common beginning, for `path` only."""
        shorter = min(len(path), len(other))
        apart = next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), shorter)
        others = {id(self.base.get_submodule(".".join(other[: i + 1]))) for i in range(apart, len(other))}
        node = self.base
        for i, name in enumerate(path):
            child = node.get_submodule(name)
            if i >= apart and id(child) in others:
                self.put(node._modules, name, twin(child))
                return
            node = child
