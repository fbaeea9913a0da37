"""The class `Deferred`: a tensor that is computed when its values are asked for, and the operators on such a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_Make = Callable[[], Sequence[Tensor]]


class Deferred(Tensor):
    """A tensor that is computed when `value` is called, and whose values are not kept afterwards.

    So a model's computed tensors can be written one at a time, whichever code computes them. A deferred tensor is
    read-only.
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
        """Return deferred tensors that `make` computes in one call, if their values are asked for one after another.

        Args:
            make: computes all of the tensors; called once more if a tensor is asked for again.
            likes: tensors of the same shapes and dtypes, on the meta device.
        """
        call = _Call(make, len(likes))
        return [Deferred(call, at, like) for at, like in enumerate(likes)]

    def value(self) -> Tensor:
        """Compute the tensor now, and return it."""
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


class _Computing(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if args and isinstance(args[0], Deferred) and (func.is_view or func._schema.is_mutable):
            return func(*args, **(kwargs or {}))  # a view reads no values, and what writes is refused
        given, named = pytree.tree_map_only(Deferred, Deferred.value, (args, dict(kwargs or {})))
        return func(*given, **named)


def computing() -> TorchDispatchMode:
    """Return a context in which each operator computes the deferred tensors that it reads, and does not keep them.

    So a model with deferred parameters can be called, with one of them in memory at a time. Views stay deferred.
    """
    return _Computing()


class _Call:
    """A function that computes several tensors; each result is kept until it has been taken once."""

    def __init__(self, make: _Make, count: int) -> None:
        self.make, self.count = make, count
        self.left: dict[int, Tensor] = {}

    def take(self, at: int) -> Tensor:
        if at not in self.left:
            self.left = dict(enumerate(self.make()))
        return self.left.pop(at)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
