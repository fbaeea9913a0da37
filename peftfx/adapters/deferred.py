"""Deferred: a tensor that is made when its values are asked for; operators on it wait as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_Make = Callable[[], Sequence[Tensor]]


class Deferred(Tensor):
    """Looks like a tensor; nothing is computed until `value` is called, and nothing is kept after.

    So what is made of a model, by whatever code, can be written one tensor at a time. It is read-only.
    """

    _call: _Call
    _at: int

    @staticmethod
    def __new__(cls, call: _Call, at: int, like: Tensor) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=torch.device("cpu")
        )
        made._call, made._at = call, at
        return made

    @staticmethod
    def of(make: _Make, likes: Sequence[Tensor]) -> list[Deferred]:
        """What `make` gives, when it is called; it is called once for all, if they are asked for one after another.

        Args:
            make: makes them; a second time, where one is asked for again.
            likes: of their shapes and dtypes, on the meta device.
        """
        call = _Call(make, len(likes))
        return [Deferred(call, at, like) for at, like in enumerate(likes)]

    def value(self) -> Tensor:
        """The tensor, made now."""
        return self._call.take(self._at)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = args, dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) and isinstance(first, Deferred):
            return Deferred(first._call, first._at, first)
        if func._schema.is_mutable:
            raise TypeError(f"{func} writes into what is not made yet")
        metas, named = pytree.tree_map_only(Tensor, _meta, given)
        leaves, spec = pytree.tree_flatten(func(*metas, **named))

        def make() -> list[Tensor]:
            values, named = pytree.tree_map_only(Deferred, Deferred.value, given)
            return pytree.tree_leaves(func(*values, **named))

        return pytree.tree_unflatten(Deferred.of(make, leaves), spec)


class _Call:
    """Something that makes tensors: what it made is kept until each has been taken."""

    def __init__(self, make: _Make, count: int) -> None:
        self.make, self.count = make, count
        self.left: dict[int, Tensor] = {}

    def take(self, at: int) -> Tensor:
        if at not in self.left:
            self.left = dict(enumerate(self.make()))
        return self.left.pop(at)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
