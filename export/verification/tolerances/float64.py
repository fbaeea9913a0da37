"""Modes in which torch computes in float64 or float32, whatever the dtypes of the weights and of the model's own casts.

Each weight is widened when it is used, and then released; large weights some rows at a time. No second copy of the
weights is in memory. The difference between the results in float64 and in the model's own dtype shows how far that
dtype is from exact arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftfx.graph.lazy_weights import exact

aten = torch.ops.aten
_Dtypes = Mapping[torch.dtype, torch.dtype]
_FLOAT64: _Dtypes = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
_FLOAT32: _Dtypes = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
_wider: ContextVar[_Dtypes] = ContextVar("wider", default=_FLOAT64)  #: what dtypes become
_rounds: ContextVar[bool] = ContextVar("rounds", default=False)  #: whether weights are rounded to the model's dtype
MOST_EXACT = 1 << 28  #: the most parameters times calls that are run in float64
_AT_ONCE = 1 << 18  #: how many numbers of a weight are widened at a time
#: Operators that pick some numbers of a tensor by position. Only their results are widened.
_PICKS = frozenset({aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default})


def float64(*, rounded: bool = False) -> AbstractContextManager[None]:
    """Compute every operator on floating-point numbers in float64 while this context lasts.

    Args:
        rounded: whether weights have the values that they have in the model's dtype, if their files have others.
    """
    return _computing(_FLOAT64, rounded)


def float32(*, rounded: bool = False) -> AbstractContextManager[None]:
    """Compute every operator on numbers in half precision in float32 while this context lasts; see `float64`."""
    return _computing(_FLOAT32, rounded)


@contextlib.contextmanager
def _computing(wider: _Dtypes, rounded: bool) -> Iterator[None]:
    tokens = _wider.set(wider), _rounds.set(rounded)
    try:
        with _Checked(), _Wide():
            yield
    finally:
        _wider.reset(tokens[0])
        _rounds.reset(tokens[1])


class _Checked(TorchFunctionMode):
    """A mode for functions that look at the dtypes of their operands before any operator: they get widened ones."""

    def __torch_function__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "").partition(".")[0]  # an operator of a graph is `conv1d.default`
        if name == "rms_norm":
            args, given = (), _with_epsilon(*args, **given)  # type: ignore[arg-type]
        if name in _CHECKED:
            args, given = pytree.tree_map(_wide, (args, given))
        return func(*args, **given)


def _with_epsilon(
    input: object, normalized_shape: object, weight: Tensor | None = None, eps: float | None = None
) -> dict[str, object]:
    """Return the arguments of an RMS norm with its epsilon: without one, torch takes that of the dtype of its numbers.

    In half precision it takes that of float32. A norm without a weight is taken for one of a float32 model.
    """
    own = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
    given = torch.finfo(own).eps if eps is None else eps
    return {"input": input, "normalized_shape": normalized_shape, "weight": weight, "eps": given}


_CHECKED = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "rms_norm"),
        *("scaled_dot_product_attention", "grouped_mm", "_grouped_mm"),
    }
)


class _Wide(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func.is_view:  # a view computes nothing: its readers widen it
            return func(*args, **given)
        if func in _PICKS:
            return _wide(func(*args, **given))
        if func._schema.is_mutable:
            return func(*_as_first(args), **given)
        if (made := _product(func, args)) is not None:
            return made
        args, given = pytree.tree_map(_wide, (args, given))
        return pytree.tree_map(_wide, func(*args, **given))


def _wide(value: object) -> object:
    """Widen a floating-point tensor or dtype. Any other value is returned unchanged."""
    if isinstance(value, torch.dtype):
        return _wider.get().get(value, value)
    return _widened(value) if isinstance(value, Tensor) else value


def _widened(value: Tensor) -> Tensor:
    wider = _wider.get()
    return _values(value).to(wider[value.dtype]) if value.dtype in wider else value


def _values(value: Tensor) -> Tensor:
    """Return the values of a tensor that may be a weight in a file."""
    stored = exact(value)
    if stored is value or not _rounds.get():
        return stored
    with _disable_current_modes():  # these modes would cast to a wider dtype instead
        return stored.to(value.dtype)


def _as_first(args: tuple[object, ...]) -> tuple[object, ...]:
    """Cast the operands of an in-place write to the dtype of the tensor that is written."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return args
    wanted = first.dtype
    return pytree.tree_map_only(Tensor, lambda t: t.to(wanted) if t.is_floating_point() else t, args)


def _product(func: object, args: tuple[Any, ...]) -> Tensor | None:
    """Compute a product with a large weight, some columns at a time, or in groups. Return None for other operators."""
    if func is aten._grouped_mm.default:
        return _grouped_product(*args)
    if func is aten.mm.default:
        bias, x, weight = None, *args
    elif func is aten.addmm.default and len(args) == 3:
        bias, x, weight = args
    else:
        return None
    wider = _wider.get()
    if weight.dtype not in wider or weight.numel() <= _AT_ONCE or x.dtype not in (*wider, wider[weight.dtype]):
        return None
    wide, weight = _widened(x), _values(weight)
    step = max(1, _AT_ONCE // weight.shape[0])
    parts = [wide @ _widened(weight[:, start : start + step]) for start in range(0, weight.shape[1], step)]
    found = torch.cat(parts, 1)
    return found if bias is None else found + _widened(bias)


def _grouped_product(
    rows: Tensor, weights: Tensor, ends: Tensor | None = None, bias: object = None, dtype: object = None
) -> Tensor | None:
    """Compute a product of groups of rows with a weight for each group, which torch has in half precision alone.

    Return None for products of other kinds: torch then says that it cannot compute them.

    Args:
        rows: [rows, in], sorted by groups.
        weights: [groups, in, out]; one is widened at a time.
        ends: the number of rows up to the end of each group.
        bias, dtype: torch has none of these here, or they do not matter.
    """
    if rows.ndim != 2 or weights.ndim != 3 or ends is None or bias is not None:
        return None
    found = rows.new_zeros(len(rows), weights.shape[2], dtype=_wider.get().get(rows.dtype, rows.dtype))
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        if end > start:
            found[start:end] = _widened(rows[start:end]) @ _widened(weight)
        start = end
    return found
