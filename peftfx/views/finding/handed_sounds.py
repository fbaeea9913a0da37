"""Finds whether sounds can be written into the embedded text that a forward hands on, beside images or none.

The forward is run on fake tensors, with sounds and without. What it computes is told by how it is computed: each result
has a key, which is made of its operator and the keys of the operands. So two runs compute the same where the keys are
the same, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftfx.bases.processors.sounds.in_forward import COMPARES
from peftfx.errors import first_line, raise_if_memory_is_out
from peftfx.graph.capturing.known_values import known_values
from peftfx.views.dry_run import fake_run
from peftfx.views.sounds.encoded import EMBEDDED, Sounds, handed_to

_TEXT, _MASK = "input_ids", "attention_mask"
_FEW = 4096  #: numbers of a tensor that code makes anew in each run
_aten = torch.ops.aten
_SAME = frozenset({_aten.unsqueeze.default, _aten.expand.default, _aten._to_copy.default, _aten.clone.default})
_WRITES = frozenset({_aten.masked_scatter.default, _aten.masked_scatter_.default})


class _HandedOn(Exception):
    """Ends a forward where it hands embedded text on to a part of the model."""


class _AnyNumber(TorchFunctionMode):
    """Code that compares how many tokens a text has with a number of features that is not known finds them equal."""

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in COMPARES and not args[0].ndim and isinstance(args[1], torch.SymInt):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return torch.tensor(True)
        return func(*args, **(kwargs or {}))


class _Keys(TorchDispatchMode):
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
        """Return the key of a tensor, or of a number as it is."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, int | float | bool | str | type(None)) else repr(value)
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
        for value in (v for v, a in zip(args, func._schema.arguments, strict=False) if _is_written(a)):
            if isinstance(value, Tensor):
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


def why_not_handed(base: nn.Module, ids: Tensor, given: Mapping[str, Tensor], sounds: Sounds) -> str:
    """Return why features of sounds cannot be written into the embedded text that a forward hands on, or nothing.

    The forward has to write the features, in order, at the tokens of sounds, into what it would hand on without them,
    and to hand the result on, with the same other arguments.

    Args:
        base: the model; it is run on fake tensors.
        ids: a text with the tokens of sounds.
        given: the recordings and their masks.
        sounds: how the model reads sounds.
    """
    with fake_run(base) as fake:
        mask, heard = fake(torch.ones_like(ids)), {name: fake(value) for name, value in given.items()}
        try:
            with known_values([ids]), _AnyNumber(), _Keys() as keys:
                own = _handed_on(base, keys, {_TEXT: ids, _MASK: mask, **heard})
                other = _handed_on(base, keys, {_TEXT: ids, _MASK: mask})
        except Exception as error:  # whatever the model's code raises
            raise_if_memory_is_out(error)
            return first_line(error)
    if len(keys.written) != 1 or own is None or other is None:
        return "its code does not write them at once into embedded text that it hands on to a part of the model"
    target, places, result = keys.written[0]
    if own.pop(EMBEDDED) != result or other.pop(EMBEDDED) != target:
        return "its code changes the embedded text in another way too where there are sounds"
    if not _at(places, ids, sounds.token):
        return "its code writes them at other places than the tokens of sounds"
    return "" if own == other else "its code gives its text model other arguments with them"


def _handed_on(base: nn.Module, keys: _Keys, given: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Return the keys of the arguments with which a forward first calls a part that takes embedded text, by name."""
    found = dict[str, object]()

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get(EMBEDDED) is not None:
            flat, _ = pytree.tree_flatten_with_path(kwargs)
            found.update({_name(path): keys.of(value) for path, value in flat})
            raise _HandedOn

    handles = [part.register_forward_pre_hook(called, with_kwargs=True) for part in handed_to(base)]
    try:
        base(**given)
    except _HandedOn:
        return found
    finally:
        for handle in handles:
            handle.remove()
    return None


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
        return hash((str(value.dtype), tuple(value.shape), *value.flatten().tolist()))


def _at(places: Tensor, ids: Tensor, token: int) -> bool:
    """Return whether places, [batch, sequence] or with an axis of the width, are those of a token in a text."""
    if isinstance(places, FakeTensor):
        return False
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        wanted = ids == token
        return places.shape[:2] == wanted.shape and bool((places.reshape(*wanted.shape, -1) == wanted[..., None]).all())
