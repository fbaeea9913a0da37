"""What a forward hands on to its text model, told by how it is computed, in runs on fake tensors.

Each result has a key, which is made of its operator and the keys of the operands. So two runs compute the same where
the keys are the same, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftfx.errors import raise_if_memory_is_out
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.handed.arguments import handed_arguments

_FEW = 4096  #: numbers of a tensor that code makes anew in each run
_aten = torch.ops.aten
_SAME = frozenset({_aten.unsqueeze.default, _aten.expand.default, _aten._to_copy.default, _aten.clone.default})
_WRITES = frozenset({_aten.masked_scatter.default, _aten.masked_scatter_.default})


class ValueKeys(TorchDispatchMode):
    """Keys of what a model's code computes, each of an operator and of the keys of its operands.

    What is written into a tensor in place is a part of the keys of all that share its memory.

    Attributes:
        written: of each write of features the key of its target, the places, and the key of the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[object, Tensor, object]] = []
        self._keys: dict[int, tuple[Tensor, object, int]] = {}  # with the tensors, so that no other gets their ids
        self._into: dict[int, list[object]] = {}
        self._moved: dict[int, Tensor] = {}

    def of(self, value: object) -> object:
        """Return the key of a tensor, or of something else by its words: Python has one hash for -1 and -2."""
        if not isinstance(value, Tensor):
            return repr(value)
        known = self._keys.get(id(value))
        if known is None:
            key = _of_numbers(value)
            known = self._keys[id(value)] = value, (id(value) if key is None else key), 0
        _, key, before = known
        into = self._into.get(_memory(value), [])[before:]
        return hash((key, *into)) if into else key

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        flat = pytree.tree_leaves((args, named))
        key = hash((str(func), *map(self.of, flat)))
        target = self.of(args[0]) if func in _WRITES else None
        made = func(*args, **named)
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else named.get(argument.name)
            if _is_written(argument) and isinstance(value, Tensor):
                self._into.setdefault(_memory(value), []).append(key)
        for place, value in enumerate(pytree.tree_leaves(made)):
            if isinstance(value, Tensor) and all(value is not leaf for leaf in flat):
                self._keys[id(value)] = value, hash((key, place)), len(self._into.get(_memory(value), ()))
        if func in _SAME:
            self._moved[id(made)] = args[0]
        if func in _WRITES and made.is_floating_point():
            places = args[1]
            while isinstance(places, FakeTensor) and id(places) in self._moved:
                places = self._moved[id(places)]
            self.written.append((target, places, self.of(made)))
        return made


def handed_on(base: nn.Module, keys: ValueKeys, given: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Return the keys of the arguments with which a forward first calls a part that takes embedded text, by name."""
    arguments = handed_arguments(base, given)
    if arguments is None:
        return None
    flat, _ = pytree.tree_flatten_with_path(arguments)
    return {_name(path): keys.of(value) for path, value in flat}


def _name(path: tuple[Any, ...]) -> str:
    return "".join(str(getattr(part, "key", part)) for part in path)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _memory(value: Tensor) -> int:
    return int(StorageWeakRef(value.untyped_storage()).cdata)


def _of_numbers(value: Tensor) -> object:
    """Return a key of a small tensor of plain numbers, which code may make anew in each run; else None."""
    if isinstance(value, FakeTensor | nn.Parameter) or value.is_meta or value.numel() > _FEW:
        return None
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return hash((str(value.dtype), tuple(value.shape), repr(value.flatten().tolist())))


def ignores(base: nn.Module, name: str, ids: Tensor) -> bool:
    """Return whether a forward hands on the same with an argument of a text's shape as without it.

    Args:
        base: the model; it is run on fake tensors.
        name: the argument.
        ids: a text.
    """
    with fake_run(base) as fake:
        text = {"input_ids": fake(ids), "attention_mask": fake(torch.ones_like(ids))}
        given = fake(torch.ones_like(ids))
        try:
            with ValueKeys() as keys:
                one, other = (handed_on(base, keys, more) for more in (text, {**text, name: given}))
        except Exception as error:  # whatever the model's code raises
            raise_if_memory_is_out(error)
            return False
    return one is not None and one == other
