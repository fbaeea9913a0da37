"""sizes: where an export is right: each condition of its capture tried on the other side, against the eager model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.graph.conditions import Condition, unmet
from peftfx.graph.graph import Graph

Sized = Mapping[str, int]
_Case = dict[str, Tensor]
Make = Callable[[Sized], _Case]
Eager = Callable[[_Case], Sequence[Tensor]]
_REFUSED = "the model takes no other"
BRANCHES = "beyond, the model computes something else"
UNTRIED = "what is beyond is too large to be tried here"
_SAME, _UNREACHED = "same", "no such call can be made"
#: Tokens (rows, pixels) of a call that is tried, and these times the parameters; of a large model, a few at least.
MOST_ROWS, MOST_WORK, LEAST_ROWS = 4096, 2 << 30, 8
_TRIALS = 3  #: sizes on the other side of a condition


@dataclass(frozen=True)
class Limit:
    """A condition under which an export is right, and what is beyond it."""

    condition: Condition
    why: str

    def __str__(self) -> str:
        return f"{self.condition} ({self.why})"


@dataclass(frozen=True)
class Sizes:
    """Where an export is right.

    Attributes:
        limits: what has to hold; nothing where it is right for all sizes.
        probes: sizes around every bound, at which it has to be right too.
    """

    limits: tuple[Limit, ...] = ()
    probes: tuple[Sized, ...] = ()

    def allow(self, sizes: Sized) -> bool:
        """Whether the export has to be right there."""
        return not unmet((limit.condition for limit in self.limits), sizes)


EVERY = Sizes()


@dataclass(frozen=True)
class Trial:
    """A captured graph and the eager model, to be compared at sizes that are asked for.

    Attributes:
        graph: of the base, captured as it is exported.
        make: inputs of these sizes of named axes; raises where there are none.
        eager: what the model's own code gives for them, as the graph does; raises where it takes no such sizes.
        shown: what to compare of an output, given its name, the inputs and its value.
        usual: the sizes that other axes have meanwhile.
        parameters: how many the model has.
    """

    graph: Graph
    make: Make
    eager: Eager
    shown: Callable[[str, _Case, Tensor], Tensor]
    usual: Sized
    parameters: int

    def is_of_images(self, condition: Condition) -> bool:
        """Whether a condition is on the sizes of images alone: a model is made for one, and which it is can be said."""
        images = [spec.shape[2:] for spec in self.graph.inputs if len(spec.shape) > 3 and spec.dtype.is_floating_point]
        return bool(condition.axes) and set(condition.axes) <= {axis for shape in images for axis in shape}

    def tells(self, condition: Condition, sizes: Sized) -> bool:
        """Whether a wrong answer at these sizes says something of this condition: those of other axes hold there."""
        others = (c for c in self.graph.conditions if not c.relation and not set(c.axes) & set(condition.axes))
        return all(other.met(sizes) for other in others)

    def affords(self, sizes: Sized) -> bool:
        """Whether a call of these sizes may be tried."""
        most = max(LEAST_ROWS, min(MOST_ROWS, MOST_WORK // max(1, self.parameters)))
        return self._rows(sizes) <= most

    def _rows(self, sizes: Sized) -> int:
        shapes = ([sizes.get(axis, 1) for axis in spec.shape if isinstance(axis, str)] for spec in self.graph.inputs)
        return max((math.prod(shape) for shape in shapes), default=1)

    def whole(self, sizes: Sized) -> dict[str, int]:
        """A size for each axis, given some: the usual ones, or 2 where such a call is too large to be tried."""
        found = self._whole(sizes, self.usual)
        return found if self.affords(found) else self._whole(sizes, dict.fromkeys(self.usual, 2))

    def _whole(self, sizes: Sized, others: Sized) -> dict[str, int]:
        found = dict(sizes)
        for condition in self.graph.conditions:
            if condition.relation:
                found |= _related(condition, {**others, **found}, found)
        return {**others, **found}

    def reach(self, condition: Condition, sizes: Sized) -> _Case | None:
        """Inputs of these sizes, for which a condition does not hold; nothing if no such call can be made."""
        try:
            case = self.make(sizes)
        except PeftfxError:
            return None
        return None if condition.met(self.graph.sizes_of(case)) else case

    def answer(self, case: _Case) -> str:
        """What becomes of the graph with these inputs."""
        try:
            want = self.eager(case)
        except Exception:  # whatever the model's code raises for a size it does not take
            return _REFUSED
        try:
            with torch.no_grad():
                got = self.graph.run(*(case[spec.name] for spec in self.graph.inputs))
        except Exception:  # an operator of the graph that was told a size
            return BRANCHES
        named = zip(self.graph.outputs, want, got, strict=True)
        same = all(_same(a, b, functools.partial(self.shown, name, case)) for name, a, b in named)
        return _SAME if same else BRANCHES


def find_sizes(trial: Trial, *, allow_fixed: bool = False) -> Sizes:
    """Try every condition of a graph on its other side: does the model take such sizes, and is the graph right there?

    A condition that makes no difference is none. One that splits the sizes that the model takes is refused, but for the
    sizes of images, where it is said.

    Raises:
        PeftfxError: the graph is right on one side of a branch in the model's code, and the model takes the other;
            not with `allow_fixed`.
    """
    limits, probes = list[Limit](), list[Sized]()
    known: dict[tuple[tuple[str, int], ...], str] = {}
    for condition in trial.graph.conditions:
        if condition.relation:
            limits.append(Limit(condition, _REFUSED))
            continue
        around = [trial.whole(sizes) for sizes in condition.tried()]
        beyond = [sizes for sizes in around if not condition.met(sizes)]
        tried = [sizes for sizes in beyond if trial.affords(sizes) and trial.tells(condition, sizes)][:_TRIALS]
        answers = []
        for sizes in tried:
            key, case = tuple(sorted(sizes.items())), trial.reach(condition, sizes)
            if case is not None and key not in known:
                known[key] = trial.answer(case)
            answers.append(_UNREACHED if case is None else known[key])
        why = _verdict(answers)
        if why == BRANCHES and not allow_fixed and not trial.is_of_images(condition):
            hint = (
                "export with inputs=... of the sizes you will serve and --allow-fixed (allow_fixed=True), or rewrite it"
            )
            what = f"the model's code branches on a size: this export would be right only where {condition}"
            raise PeftfxError(what, condition.where, hint)
        limits += [Limit(condition, why)] if why else []
        if not condition.edge:  # a size of 1 is verified at, whether the code asks for it or not
            probes += [sizes for sizes, answer in zip(tried, answers, strict=True) if answer == _SAME][:1]
            probes += _last(condition, around)
    found = Sizes(tuple(limits))
    probes = [sizes for sizes in probes if found.allow(sizes) and trial.affords(sizes)]
    return Sizes(found.limits, tuple(sizes for i, sizes in enumerate(probes) if sizes not in probes[:i]))


def _verdict(answers: Sequence[str]) -> str:
    if not answers:
        return UNTRIED
    why = next((why for why in (BRANCHES, _SAME, _REFUSED) if why in answers), _UNREACHED)
    return why if why in (BRANCHES, _REFUSED) else ""


def _last(condition: Condition, around: Sequence[Sized]) -> Iterator[Sized]:
    """The sizes that are just within a condition: the next size of an axis is beyond it."""
    for sizes in around:
        steps = ({**sizes, axis: sizes[axis] + step} for axis in condition.axes for step in (1, -1))
        if condition.met(sizes) and not all(condition.met(next_to) for next_to in steps if min(next_to.values()) > 0):
            yield sizes
            return


def _related(relation: Condition, sizes: Sized, chosen: Sized) -> dict[str, int]:
    """The size of an axis that follows from those that were chosen."""
    values = {sympy.Symbol(axis, integer=True, positive=True): sympy.Integer(size) for axis, size in sizes.items()}
    left, right = relation.holds.args
    for axis, value in ((left, right), (right, left)):
        number = value.xreplace(values)
        if axis.is_Symbol and str(axis) not in chosen and number.is_Integer:
            return {str(axis): int(number)}
    return {}


def _same(want: Tensor, got: Tensor, shown: Callable[[Tensor], Tensor]) -> bool:
    if want.shape != got.shape:
        return False
    a, b = shown(want).double(), shown(got).double()
    half = want.dtype in (torch.float16, torch.bfloat16)
    tolerance = 2e-2 if half else 1e-4
    finite = a[a.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, largest), equal_nan=True)
