"""Shared symbols for sizes: during a capture, free axes of the same name have the same symbol.

torch.export gives each free axis a separate symbol. Then the batch axis of each layer's keys and values has another
symbol, no layer has the shapes of the layer before, and half of all operators miss the cache of fake tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def tied(axes: Sequence[Sequence[str | None]]) -> Iterator[None]:
    """Give all sizes of one name the same symbol in this thread's captures. Not for two threads at once.

    Args:
        axes: the name of each axis of each input, in order. If two axes of one name have different sizes in this call,
            each size has its own symbol: they are not the same axis.
    """
    names = {place_of(n, i): axis for n, own in enumerate(axes) for i, axis in enumerate(own) if axis is not None}
    own, create = threading.get_ident(), ShapeEnv.create_symbol
    first: dict[tuple[ShapeEnv, str, object], sympy.Expr] = {}

    def find(env: ShapeEnv, val: Any, source: Source, *args: Any, **kwargs: Any) -> sympy.Expr:
        if threading.get_ident() != own or source.name not in names:
            return create(env, val, source, *args, **kwargs)
        key = env, names[source.name], val
        if key not in first:
            first[key] = create(env, val, source, *args, **kwargs)
        elif first[key].is_Symbol:
            env.source_to_var[source.name] = first[key]
            env.var_to_sources[first[key]].append(source)
        return first[key]

    ShapeEnv.create_symbol = find  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShapeEnv.create_symbol = create  # type: ignore[method-assign]


def place_of(number: int, axis: int) -> str:
    """Return torch's name of the size of an input's axis."""
    return f"L['flat'][{number}].size()[{axis}]"


def symbols_of(values: Iterable[object]) -> Mapping[str, sympy.Expr]:
    """Return the symbols of a capture's free sizes, by the size's name in torch, given the captured values."""
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    return {} if mode is None or mode.shape_env is None else mode.shape_env.source_to_var
