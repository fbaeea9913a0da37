"""Conditions: the assumptions of a captured program about the sizes of a call."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import Mod, PythonMod
from torch.utils._sympy.printers import PythonPrinter

_SAMPLES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 33, 64, 1 << 20)
_LARGEST, _MOST = 1 << 20, 4096
_STEPS = 4096  #: how far from sizes others are looked for: a token of a recording is hundreds of samples


@dataclass(frozen=True)
class Condition:
    """A statement about named axes. If it holds, a captured program computes what the model's code computes.

    Attributes:
        holds: the statement; its symbols have the names of the axes.
        where: the line of code that made the statement, such as `file.py:12`.
        code: whether Python code of the model branched on it, and not one of torch's operators.
        edge: whether the capture took this branch only because it assumes that no size is less than 2.
        below: whether the size of a tensor is below 0 where it does not hold.
    """

    holds: sympy.Basic
    where: str = field(default="", compare=False)
    code: bool = False
    edge: bool = False
    below: bool = False

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes in the statement, sorted."""
        return tuple(sorted(str(s) for s in self.holds.free_symbols))

    @property
    def relation(self) -> bool:
        """Whether the statement fixes the size of an axis by the sizes of other axes."""
        if not isinstance(self.holds, sympy.Eq) or self.code:
            return False
        left, right = self.holds.args
        return any(
            a.is_Symbol and b.free_symbols and a not in b.free_symbols for a, b in ((left, right), (right, left))
        )

    @property
    def is_equality(self) -> bool:
        """Whether the statement is that two axes have one size."""
        return isinstance(self.holds, sympy.Eq) and all(side.is_Symbol for side in self.holds.args)

    def met(self, sizes: Mapping[str, int]) -> bool:
        """Return whether the statement holds for these sizes. It counts as met if a size that it needs is missing."""
        axes, test = _compiled(self.holds)
        if any(axis not in sizes for axis in axes):
            return True
        try:
            return test(*(sizes[axis] for axis in axes))
        except ZeroDivisionError:  # the statement says nothing about these sizes
            return True

    def tried(self) -> Iterator[dict[str, int]]:
        """Yield sizes of the statement's axes, the smallest first, including those near each of its numbers."""
        numbers = {int(n) for n in self.holds.atoms(sympy.Integer) if 0 < n < _LARGEST}
        around = {size for n in numbers for size in (n - 1, n, n + 1, 2 * n)}
        choices = sorted({*_SAMPLES, *around} - {0})
        most = max(2, round(_MOST ** (1 / max(1, len(self.axes)))))
        if len(choices) > most:
            choices = [choices[i * (len(choices) - 1) // (most - 1)] for i in range(most)]
        empty = {str(s) for s in self.holds.free_symbols if not s.is_positive}  # axes that may be empty
        product = itertools.product(*([0, *choices] if axis in empty else choices for axis in self.axes))
        for sizes in sorted(product, key=lambda sizes: (math.prod(sizes), sizes)):
            yield dict(zip(self.axes, sizes, strict=True))

    def broken_near(self, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Yield sizes of the statement's axes that do not meet it, the nearest to these first, one axis changed."""
        own = {axis: sizes[axis] for axis in self.axes if axis in sizes}
        for step in range(1, _STEPS):
            for axis, by in itertools.product(own, (step, -step)):
                changed = {**own, axis: own[axis] + by}
                if changed[axis] > 0 and not self.met(changed):
                    yield changed

    def __str__(self) -> str:
        return _in_words(self.holds)


def have_rests(conditions: Iterable[Condition], sizes: Mapping[str, int]) -> bool:
    """Return whether each division that the conditions are about leaves a rest at these sizes."""
    rests = {rest for condition in conditions for rest in condition.holds.atoms(Mod, PythonMod)}
    return all(rest.xreplace({s: sympy.Integer(sizes[str(s)]) for s in rest.free_symbols}) != 0 for rest in rests)


def unmet(conditions: Iterable[Condition], sizes: Mapping[str, int], *, edges: bool = True) -> list[Condition]:
    """Return the conditions that do not hold for these sizes. `edges=False` omits those that only size 1 breaks."""
    return [c for c in conditions if (edges or not c.edge) and not c.met(sizes)]


def completed(
    conditions: Iterable[Condition], chosen: Mapping[str, int], usual: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return sizes with those that follow from them by relations.

    Args:
        conditions: the conditions, of which the relations are used, in order.
        chosen: the chosen sizes, by axis.
        usual: the sizes of the other axes, unless a relation gives another.
    """
    found = dict(chosen)
    for condition in conditions:
        if condition.relation:
            found |= _related(condition, {**(usual or {}), **found}, found)
    return {**(usual or {}), **found}


def _related(relation: Condition, sizes: Mapping[str, int], chosen: Mapping[str, int]) -> dict[str, int]:
    """Return the size of an axis that follows from the chosen sizes by a relation."""
    values = {sympy.Symbol(axis, integer=True, positive=True): sympy.Integer(size) for axis, size in sizes.items()}
    left, right = relation.holds.args
    for axis, value in ((left, right), (right, left)):
        number = value.xreplace(values)
        if axis.is_Symbol and str(axis) not in chosen and number.is_Integer:
            return {str(axis): int(number)}
    return {}


@functools.cache
def _compiled(holds: sympy.Basic) -> tuple[tuple[str, ...], Callable[..., bool]]:
    symbols = sorted(holds.free_symbols, key=str)
    plain = {symbol: sympy.Symbol(f"size{i}", integer=True) for i, symbol in enumerate(symbols)}
    text = PythonPrinter().doprint(holds.xreplace(plain))
    arguments = ", ".join(str(s) for s in plain.values())
    scope: dict[str, object] = {"math": math, "torch": torch}  # roots are printed as `torch.sym_sqrt`
    return tuple(map(str, symbols)), eval(f"lambda {arguments}: bool({text})", scope)


def _in_words(holds: sympy.Basic) -> str:
    if isinstance(holds, sympy.Rel) and all(side.could_extract_minus_sign() for side in holds.args):
        holds = holds.reversedsign  # `-size <= -12` says that the size is at least 12
    words = {sympy.Eq: "=", sympy.Ne: "!=", sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">"}
    word = next((w for kind, w in words.items() if isinstance(holds, kind)), None)
    if word is None:
        return _Words().doprint(holds)
    left, right = map(_Words().doprint, holds.args)
    return f"{left} {word} {right}"


class _Words(StrPrinter):  # type: ignore[misc]
    """Writes torch's functions of sizes as in Python."""

    def _between(self, word: str, expr: sympy.Basic) -> str:
        left, right = (self.parenthesize(side, PRECEDENCE["Mul"]) for side in expr.args)
        return f"{left} {word} {right}"

    def _print_Mod(self, expr: sympy.Basic) -> str:
        return self._between("%", expr)

    def _print_IntTrueDiv(self, expr: sympy.Basic) -> str:
        return self._between("/", expr)

    def _print_ToFloat(self, expr: sympy.Basic) -> str:
        return str(self._print(expr.args[0]))

    def _print_TruncToInt(self, expr: sympy.Basic) -> str:
        return f"int({self._print(expr.args[0])})"

    _print_PythonMod, _print_FloatTrueDiv = _print_Mod, _print_IntTrueDiv
