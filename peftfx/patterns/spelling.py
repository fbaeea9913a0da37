"""Spelling: a plain torch function, traced once at arbitrary sizes, so that graphs can be searched for it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from peftfx.errors import PeftfxError, first_line, nearest
from peftfx.graph.trace import trace

_AXIS = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*|\d+)")
_DTYPE = re.compile(r"\s*(\w+)\s*:(.*)")
_SIZES = (4, 6, 10, 14, 22, 26, 34, 38, 46, 58)  #: each is twice a prime: all are different, and all can be halved
_FIRST_NUMBER = 0.7316  #: the first stand-in for a free number; further numbers get a little more


@dataclass(frozen=True)
class Spelling:
    """One function that computes a pattern.

    Attributes:
        function: the user's function.
        tensors: the names of the function's tensor arguments, in order.
        numbers: the names of the free numbers, by the stand-in of each in the trace.
        program: the trace; its inputs are the tensors.
        order: the names of all arguments of the function, in order.
    """

    function: Callable[..., object] = field(repr=False)
    tensors: tuple[str, ...]
    numbers: Mapping[float, str]
    program: fx.GraphModule = field(repr=False, compare=False)
    order: tuple[str, ...]

    @property
    def output(self) -> fx.Node:
        """The node of the trace that the function returns."""
        (output,) = self.program.graph.find_nodes(op="output")
        return output.args[0]

    def again(self, values: Mapping[str, Tensor], numbers: Mapping[str, float]) -> fx.GraphModule:
        """Trace the function again, at the sizes and with the numbers of a match."""
        return trace(_called(self.function, self.order, self.tensors, numbers), _of(self, values), _name(self), "")


def _of(spelling: Spelling, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values[name] for name in spelling.tensors]


def _name(spelling: Spelling) -> str:
    return getattr(spelling.function, "__name__", "the pattern")


def spell(function: Callable[..., object], axes: Mapping[str, str]) -> Spelling:
    """Trace a function as a spelling.

    Args:
        function: a function of tensors, and of numbers that are annotated as `float`. Other arguments keep their
            defaults.
        axes: for each tensor, the names of its axes, after its dtype if that is not float32: `"batch length width"`,
            `"2*inner width"`, `"int64: batch length"`.

    Raises:
        PeftfxError: an argument has no axes, or the function cannot be traced, or computes nothing.
    """
    name = getattr(function, "__name__", "the pattern")
    parameters = inspect.signature(function).parameters
    if unknown := next((given for given in axes if given not in parameters), None):
        hint = nearest(unknown, parameters) or f"its arguments are {', '.join(parameters)}"
        raise PeftfxError(f"{name} has no argument {unknown!r}", "pattern", hint)
    free = [p.name for p in parameters.values() if p.annotation in (float, "float") and p.default is p.empty]
    standing = {round(_FIRST_NUMBER + i / 1000, 6): own for i, own in enumerate(free)}
    tensors = tuple(own for own in parameters if own in axes)
    lost = [p.name for p in parameters.values() if p.name not in (*axes, *free) and p.default is p.empty]
    if lost or not tensors:
        what = f"{name} does not say the axes of {', '.join(lost) or 'any tensor'}"
        hint = f'name them, as in {lost[0] if lost else "x"}="batch length width"; or annotate a number as float'
        raise PeftfxError(what, "pattern", hint)
    sizes: dict[str, int] = {}
    values = [_example(axes[own], sizes, f"{name}({own}=...)") for own in tensors]
    numbers = {own: value for value, own in standing.items()}
    order = tuple(own for own in parameters if own in axes or own in free)
    try:
        program = trace(_called(function, order, tensors, numbers), values, name, "pattern")
    except PeftfxError:
        raise
    except Exception as error:  # any error of the user's own code
        what = f"{name} fails on tensors of {', '.join(str(tuple(v.shape)) for v in values)}: {first_line(error)}"
        raise PeftfxError(what, "pattern", "the names of the axes say which sizes are equal") from error
    _refuse_odd(program, name, tensors)
    return Spelling(function, tensors, standing, program, order)


def _called(
    function: Callable[..., object], order: tuple[str, ...], tensors: tuple[str, ...], numbers: Mapping[str, float]
) -> Callable[..., object]:
    """Return the function as a function of its tensors only, by position."""

    def call(*values: Any) -> object:
        given = dict(zip(tensors, values, strict=True))
        return function(**{own: given[own] if own in given else numbers[own] for own in order})

    return call


def _example(axes: str, sizes: dict[str, int], where: str) -> Tensor:
    """Return a tensor of these axes. Each axis name has its own size."""
    found = _DTYPE.fullmatch(axes)
    dtype = getattr(torch, found[1], None) if found else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise PeftfxError(f"there is no dtype {found[1] if found else ''!r}", where, 'write "int64: batch length"')
    shape = []
    for word in (found[2] if found else axes).split():
        axis = _AXIS.fullmatch(word)
        if axis is None:
            raise PeftfxError(f"cannot read the axis {word!r}", where, 'write "batch length 2*width"')
        if axis[2].isdigit():
            own = int(axis[2])
        else:
            if axis[2] not in sizes and len(sizes) == len(_SIZES):
                raise PeftfxError(f"more than {len(_SIZES)} names of axes", where, "give axes that are free one name")
            own = sizes.setdefault(axis[2], _SIZES[len(sizes) % len(_SIZES)])
        shape.append(int(axis[1] or 1) * own)
    return torch.empty(shape, dtype=dtype).zero_()


def _refuse_odd(program: fx.GraphModule, name: str, tensors: tuple[str, ...]) -> None:
    (output,) = program.graph.find_nodes(op="output")
    if not isinstance(output.args[0], fx.Node) or output.args[0].op != "call_function":
        hint = "return one tensor that is computed; a pattern for an inner value is one of its own"
        raise PeftfxError(f"{name} returns no one tensor that it computes", "pattern", hint)
    if program.graph.find_nodes(op="get_attr"):
        raise PeftfxError(f"{name} has a tensor of its own", "pattern", "make it an argument, or write it as a number")
    inputs = zip(tensors, program.graph.find_nodes(op="placeholder"), strict=True)
    if idle := next((own for own, node in inputs if not node.users), None):
        raise PeftfxError(f"{name} does not use its argument {idle}", "pattern", "leave it out")
