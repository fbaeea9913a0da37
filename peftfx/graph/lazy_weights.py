"""Stored: a parameter that stays in its file, in the file's dtype, and is cast by each operator that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError
from peftfx.sharding.models import unhooked
from peftfx.sharding.parts import is_part, whole_shape

aten = torch.ops.aten
#: Operators that move no data. They act on the stored tensor, and the cast comes later.
_VIEWS = frozenset(
    {
        *(aten.detach.default, aten.alias.default, aten.t.default, aten.transpose.int, aten.permute.default),
        *(aten.view.default, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.expand.default),
    }
)

#: Operators that pick numbers by index. Only the picked numbers are cast.
_PICKS = frozenset({aten.embedding.default, aten.index_select.default})
_PIECE = 1 << 22  #: how many numbers of a weight are cast at a time: the allocator keeps so much memory for the next
_CAST = 1 << 19  #: how many bytes of a cast weight are multiplied at a time, so that they stay in the cache
_HALVES = {torch.float16, torch.bfloat16}
_STRIP = 256  #: bytes of each row of a transposed weight that are copied at a time: the lines stay in the cache


class Stored(Tensor):
    """A tensor that appears in `dtype`. Each operator that needs its values casts `source`, and then frees the copy.

    So a model with bfloat16 files can run in float32 with only one cast weight in memory. The tensor is read-only.

    Attributes:
        source: the stored tensor, memory-mapped.
    """

    source: Tensor

    @staticmethod
    def __new__(cls, source: Tensor, dtype: torch.dtype) -> Stored:
        made: Stored = Tensor._make_wrapper_subclass(
            cls, source.shape, source.stride(), source.storage_offset(), dtype=dtype, device=source.device
        )
        made.source = source
        return made

    def moved(self, view: Callable[[Tensor], Tensor]) -> Stored:
        """Return a view of this tensor."""
        return Stored(view(self.source), self.dtype)

    @property
    def identity(self) -> object:
        """A value that is equal for two objects of the same tensor."""
        return identity(self.source)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Stored({list(self.shape)}, {self.source.dtype} as {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        first = args[0] if args else None
        if func in _VIEWS and isinstance(first, Stored):
            return first.moved(lambda tensor: func(tensor, *args[1:], **(kwargs or {})))
        if func._schema.is_mutable and isinstance(first, Stored):
            raise PeftfxError(
                "this weight stays in its file: it cannot be written", repr(first), "load the model first"
            )
        if func in _PICKS and isinstance(first, Stored):
            return func(first.source, *args[1:], **(kwargs or {})).to(first.dtype)
        product = _in_pieces(func, args)
        if product is not None:
            return product
        args, kwargs = pytree.tree_map_only(Stored, load_tensor, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def load_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor in its dtype, in memory."""
    return tensor.source.to(tensor.dtype) if isinstance(tensor, Stored) else tensor


def load_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor in memory and contiguous. At most one copy is made, also of a transposed tensor."""
    if not isinstance(tensor, Stored):
        return tensor.contiguous()
    source = tensor.source
    if source.dtype == tensor.dtype:
        return source.contiguous()
    return torch.empty(source.shape, dtype=tensor.dtype, device=source.device).copy_(source)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the contiguous tensor in groups of rows if it is large, so that no whole second copy is in memory."""
    source = exact(tensor)
    if tensor.numel() <= _PIECE or (source.dtype == tensor.dtype and source.is_contiguous()):
        yield load_contiguous(tensor)
        return
    for part in source.split(max(1, _PIECE * len(source) // tensor.numel())):
        copy = torch.empty(part.shape, dtype=tensor.dtype, device=part.device)
        width = _STRIP // tensor.dtype.itemsize if part.ndim == 2 and part.stride(0) == 1 else part.shape[-1]
        for start in range(0, part.shape[-1], width):
            copy[..., start : start + width].copy_(part[..., start : start + width])
        yield copy


def _in_pieces(func: object, args: tuple[Any, ...]) -> Tensor | None:
    """Compute a product with a large weight of another stored dtype, some columns at a time; or return None."""
    if func is aten.mm.default:
        bias, (x, weight) = None, args
    elif func is aten.addmm.default and len(args) == 3:
        bias, x, weight = args
    else:
        return None
    if not isinstance(weight, Stored) or isinstance(x, Stored) or weight.numel() <= _PIECE:
        return None
    source, dtype = weight.source, weight.dtype
    if source.dtype == dtype or x.dtype != dtype:  # torch refuses a product of two dtypes
        return None
    wide = torch.float32 if dtype in _HALVES else dtype
    step = max(1, _CAST // wide.itemsize // weight.shape[0])
    rows = x.to(wide)
    found = torch.cat([rows @ _cast(part, dtype, wide) for part in source.split(step, 1)], 1).to(dtype)
    return found if bias is None else found + load_tensor(bias)


def _cast(part: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """Return a part of a weight, rounded to `dtype`, as `wide` numbers.

    Products of a half precision are computed in float32, as a CPU's own kernels do, and rounded once. A number of one
    half precision is not rounded to the other one: that costs more than the product, and changes only numbers that are
    too small or too large for float16.
    """
    return part.to(wide) if {part.dtype, dtype} <= _HALVES else part.to(dtype).to(wide)


def exact(tensor: Tensor) -> Tensor:
    """Return the tensor's stored values, unrounded."""
    return tensor.source if isinstance(tensor, Stored) else tensor


def identity(tensor: Tensor) -> object:
    """Return a value that is equal for two objects of the same tensor."""
    if isinstance(tensor, Stored):
        return tensor.identity
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


@contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Replace stored and sharded parameters by fake tensors of their dtypes inside the context.

    So captures do not depend on how weights are stored or sharded.
    """
    found = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    stored = [(module, name, p) for module, name, p in found if p is not None and (isinstance(p, Stored) or is_part(p))]
    if not stored:
        with unhooked(model):
            yield
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    for module, name, p in stored:
        if id(p) not in fakes:
            with mode:
                fakes[id(p)] = nn.Parameter(
                    torch.empty(whole_shape(p), dtype=p.dtype, device=p.device), p.requires_grad
                )
        module._parameters[name] = fakes[id(p)]
    try:
        with unhooked(model):
            yield
    finally:
        for module, name, p in stored:
            module._parameters[name] = p


def store(model: nn.Module, dtype: Callable[[str], torch.dtype]) -> None:
    """Make each floating-point parameter appear in the dtype wanted for its name. Its values stay where they are."""
    seen: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_floating_point():
                continue
            wanted = dtype(f"{path}.{name}" if path else name)
            if p.dtype != wanted:
                if id(p) not in seen:
                    seen[id(p)] = nn.Parameter(Stored(p.detach(), wanted), requires_grad=False)
                module._parameters[name] = seen[id(p)]
