"""Operators that take a free size where torch, or its translation to ONNX, takes a plain number.

During a capture, other operators compute the same, in which the size stays free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.utils import _pytree as pytree


def is_free(value: object) -> bool:
    """Return whether a value is a size that a capture leaves free."""
    return isinstance(value, SymInt) and value.node.maybe_as_int() is None


def holds_free(data: object) -> bool:
    """Return whether a number is computed from a free size, or one in a list of numbers, or of such lists, is."""
    leaves = pytree.tree_leaves(data)
    free = any(is_free(leaf) or isinstance(leaf, SymFloat) for leaf in leaves)
    return free and all(isinstance(leaf, int | float | SymInt | SymFloat) for leaf in leaves)


def row_of(data: Any, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Return the tensor of numbers, some of which are computed from free sizes."""
    if dtype is None:
        real = any(isinstance(leaf, float | SymFloat) for leaf in pytree.tree_leaves(data))
        dtype = torch.get_default_dtype() if real else torch.int64

    def made(item: Any) -> Tensor:
        if isinstance(item, list | tuple):
            return torch.stack([made(one) for one in item])
        return torch.scalar_tensor(item, dtype=dtype, device=device)

    return made(data).requires_grad_(requires_grad)


def stand_in(func: Callable[..., Any], args: object, kwargs: object) -> Callable[..., Any]:
    """Return the function that computes what `func` does of these arguments and leaves their sizes free."""
    other = _STAND_INS.get(func)
    if other is None or not any(map(is_free, pytree.tree_leaves((args, kwargs)))):
        return _IN_ALL_CALLS.get(func, func)
    return other


def _number(size: SymInt, like: Tensor | None = None) -> Tensor:
    device = None if like is None else like.device
    return torch.scalar_tensor(size, dtype=torch.int64, device=device)  # type: ignore[arg-type]


def _remainder(input: Tensor, other: SymInt) -> Tensor:
    return torch.remainder(input, _number(other, input))


def _roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    if dims is None or dims == ():
        return _roll(input.reshape(-1), shifts, 0).reshape(input.shape)
    pairs = zip(*((x if isinstance(x, list | tuple) else [x]) for x in (shifts, dims)), strict=True)
    for shift, dim in pairs:
        size = input.shape[dim]
        places = torch.arange(size, device=input.device) - shift
        input = input.index_select(dim, torch.remainder(places, _number(size, input)))
    return input


def _linspace(start: Any, end: Any, steps: SymInt, **how: Any) -> Tensor:
    """Count from both ends, as torch does, so that both are exact."""
    places = torch.arange(steps, device=how.get("device"))  # type: ignore[call-overload]
    rest = (steps - 1) - places
    step = (end - start) / torch.clamp(_number(steps, places) - 1, min=1)
    first = (places < rest) | (places + rest == 0)  # a single place is the start
    line = torch.where(first, start + places * step, end - rest * step)
    return line.to(how.get("dtype") or torch.get_default_dtype()).requires_grad_(how.get("requires_grad", False))


def _affine_grid(theta: Tensor, size: Any, align_corners: bool | None = None) -> Tensor:
    """Place points evenly from -1 to 1 along each axis, and map them by the matrices `theta`. A single one is at 0."""
    lines = []
    for n in size[2:]:
        places = torch.arange(n, dtype=theta.dtype, device=theta.device)
        apart = n - 1 if align_corners else n
        least = torch.clamp(_number(apart, theta), min=1)
        lines.append((2 * places - (n - 1)) / least)
    first, *others = torch.meshgrid(*lines, indexing="ij")
    points = torch.stack([*reversed([first, *others]), torch.ones_like(first)], -1)
    mapped = points.reshape(1, -1, points.shape[-1]) @ theta.mT
    return mapped.reshape(-1, *size[2:], points.shape[-1] - 1)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Gather along one axis. Along each other axis one of the two may have the size 1; torch compares the sizes."""
    if dim is None:
        return input.reshape(-1).gather(0, indices.reshape(-1))
    if input.ndim != indices.ndim:
        return torch.take_along_dim(input, indices, dim)  # which refuses it
    along = dim % input.ndim
    return _repeated(input, indices, along).gather(along, _repeated(indices, input, along))


def _repeated(value: Tensor, other: Tensor, along: int) -> Tensor:
    """Return a value with the other's sizes along the axes, but one, where its own size is 1."""
    single = [at != along and not is_free(size) and size == 1 for at, size in enumerate(value.shape)]
    sizes = [size if one else -1 for one, size in zip(single, other.shape, strict=True)]
    return value.expand(sizes) if any(single) else value


_STAND_INS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.linspace: _linspace,
    torch.nn.functional.affine_grid: _affine_grid,
    **dict.fromkeys((torch.roll, Tensor.roll), _roll),
    **dict.fromkeys((torch.remainder, Tensor.remainder, Tensor.__mod__), _remainder),
}

#: The same for functions that read the sizes of tensors, whatever their arguments are.
_IN_ALL_CALLS: Mapping[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (torch.take_along_dim, Tensor.take_along_dim), _take_along_dim
)
