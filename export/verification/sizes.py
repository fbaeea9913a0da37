"""The sizes at which an export is right. Each condition of its capture is tried on the other side, in eager code."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.export.verification.float64 import MOST_EXACT, float64
from peftfx.graph.conditions import Condition, unmet
from peftfx.graph.decisions import Decision, opposed
from peftfx.graph.graph import Graph
from peftfx.views.capturing.settling import near

Sized = Mapping[str, int]
_Case = dict[str, Tensor]
Make = Callable[[Sized], _Case]
Eager = Callable[[_Case], Sequence[Tensor]]
_REFUSED = "the model takes no other"
BRANCHES = "beyond, the model computes something else"
UNTRIED = "what is beyond is too large to be tried here"
LONGER = "the model is made for no more tokens"
#: Axes that run along texts.
_TOKENS = frozenset({"sequence", "decoder_sequence", "encoder_sequence", "encoder_total", "past", "total"})
_SAME, _UNREACHED = "same", "no such call can be made"
#: The most tokens (rows, pixels) of a tried call; the most tokens times parameters; and the fewest tokens, for a large
#: model.
MOST_ROWS, MOST_WORK, LEAST_ROWS = 4096, 2 << 30, 8
_ROUNDING = 2e-6  #: a difference of float32 results that is rounding alone, relative to the largest magnitude
_TRIALS = 3  #: how many sizes are tried on the other side of a condition


@dataclass(frozen=True)
class Limit:
    """A condition under which an export is right, and what happens otherwise."""

    condition: Condition
    why: str

    def __str__(self) -> str:
        return f"{self.condition} ({self.why})"


@dataclass(frozen=True)
class Sizes:
    """The sizes at which an export is right.

    Attributes:
        limits: the conditions that have to hold; empty if the export is right for all sizes.
        probes: sizes near every bound, at which the export has to be right, too.
        sides: branches on booleans of a call's inputs, of which the export has one side. It refuses other calls itself.
        fixed: axes of inputs that have the example's size alone, though the model's own code takes others.
    """

    limits: tuple[Limit, ...] = ()
    probes: tuple[Sized, ...] = ()
    sides: tuple[Decision, ...] = ()
    fixed: tuple[str, ...] = ()

    @property
    def told(self) -> tuple[Limit | Decision | str, ...]:
        """What a user has to know of the calls that the export takes."""
        return (*self.limits, *self.sides, *self.fixed)

    def allow(self, sizes: Sized) -> bool:
        """Say whether the export has to be right at these sizes."""
        return not unmet((limit.condition for limit in self.limits), sizes)

    def serve(self, case: Mapping[str, Tensor]) -> bool:
        """Say whether the export has the sides of the branches that these inputs take."""
        return not opposed(self.sides, case)


EVERY = Sizes()


@dataclass(frozen=True)
class Trial:
    """A captured graph and the eager model, to be compared at chosen sizes.

    Attributes:
        graph: the graph of the base, captured as for the export.
        make: makes inputs, given the sizes of named axes. It raises an error if there are no such inputs.
        eager: runs the model's own code, and returns outputs like the graph's. It raises an error if the model does not
            take the sizes.
        shown: selects what to compare of an output, given its name, the inputs and its value.
        usual: the sizes of all other axes in a call.
        parameters: the number of the model's parameters.
        longest: the number of tokens that the model is made for, by its config.
    """

    graph: Graph
    make: Make
    eager: Eager
    shown: Callable[[str, _Case, Tensor], Tensor]
    usual: Sized
    parameters: int
    longest: int | None = None

    def is_of_images(self, condition: Condition) -> bool:
        """Say whether a condition is only on the sizes of images. A model is made for one size of images."""
        images = [spec.shape[2:] for spec in self.graph.inputs if len(spec.shape) > 3 and spec.dtype.is_floating_point]
        return bool(condition.axes) and set(condition.axes) <= {axis for shape in images for axis in shape} - _TOKENS

    def is_of_long_texts(self, condition: Condition) -> bool:
        """Say whether a condition holds for all texts that the model is made for, with their past."""
        if self.longest is None or not condition.axes or not set(condition.axes) <= _TOKENS:
            return False
        texts = (s for s in condition.tried() if s.get("past", 0) + max(s.values()) <= self.longest)
        return all(map(condition.met, texts))

    def tells(self, condition: Condition, sizes: Sized) -> bool:
        """Say whether a wrong answer at these sizes is due to this condition: conditions on other axes hold there."""
        others = (c for c in self.graph.conditions if not c.relation and not set(c.axes) & set(condition.axes))
        return all(other.met(sizes) for other in others)

    def affords(self, sizes: Sized) -> bool:
        """Say whether a call of these sizes is small enough to be tried."""
        most = max(LEAST_ROWS, min(MOST_ROWS, MOST_WORK // max(1, self.parameters)))
        return self._rows(sizes) <= most

    def _rows(self, sizes: Sized) -> int:
        return max((math.prod(sizes.get(axis, 1) for axis in axes) for axes in self._free), default=1)

    @functools.cached_property
    def _free(self) -> frozenset[tuple[str, ...]]:
        """The free axes of the inputs, each distinct set once: keys and values of all layers have the same axes."""
        return frozenset(tuple(axis for axis in spec.shape if isinstance(axis, str)) for spec in self.graph.inputs)

    def whole(self, sizes: Sized) -> dict[str, int]:
        """Complete some sizes with the usual sizes of all other axes, or with 2 if such a call is too large."""
        found = self._whole(sizes, self.usual)
        return found if self.affords(found) else self._whole(sizes, dict.fromkeys(self.usual, 2))

    def _whole(self, sizes: Sized, others: Sized) -> dict[str, int]:
        found = dict(sizes)
        for condition in self.graph.conditions:
            if condition.relation:
                found |= _related(condition, {**others, **found}, found)
        return {**others, **found}

    def reach(self, condition: Condition, sizes: Sized) -> _Case | None:
        """Make inputs of these sizes that do not meet a condition. Return None if there are no such inputs."""
        try:
            case = self.make(sizes)
        except PeftfxError:
            return None
        return None if condition.met(self.graph.sizes_of(case)) else case

    def takes(self, sizes: Sized) -> bool:
        """Say whether a call of these sizes is small enough to be tried, and the model's own code runs it."""
        return self.affords(sizes) and self.runs(lambda: self.make(sizes))

    def runs(self, made: Callable[[], _Case]) -> bool:
        """Say whether inputs can be made, and the model's own code runs them."""
        try:
            self.eager(made())
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            return False
        return True

    def answer(self, case: _Case) -> str:
        """Run the model and the graph on these inputs, and say whether they agree or the model refuses."""
        try:
            want = self.eager(case)
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            return _REFUSED
        try:
            with torch.no_grad():
                got = self._run(case)
        except Exception as error:  # an operator of the graph has a fixed size
            raise_if_memory_is_out(error)
            return BRANCHES
        if not self._agree(case, want, got):
            return BRANCHES
        return _SAME if self._agree(case, want, got, _ROUNDING) or self._same_in_float64(case) else BRANCHES

    def _run(self, case: _Case) -> Sequence[object]:
        return self.graph.run(*(case[spec.name] for spec in self.graph.inputs))

    def _agree(self, case: _Case, want: Sequence[Tensor], got: Sequence[object], bound: float | None = None) -> bool:
        named = [(name, b) for name, b in zip(self.graph.outputs, got, strict=True) if isinstance(b, Tensor)]
        pairs = zip(want, named, strict=True)
        return all(_same(a, b, functools.partial(self.shown, name, case), bound) for a, (name, b) in pairs)

    def _same_in_float64(self, case: _Case) -> bool:
        """Say whether the model and the graph agree in float64: a difference that is more than rounding stays there.

        If the model is too large for it, or cannot be run in float64, the answer is yes.
        """
        if self.parameters > MOST_EXACT:
            return True
        try:
            with torch.no_grad(), float64():
                want, got = self.eager(case), self._run(case)
        except Exception as error:  # such as an operator without float64 in a model's own code
            raise_if_memory_is_out(error)
            return True
        return self._agree(case, want, got, _ROUNDING)


def find_sizes(trial: Trial, *, allow_fixed: bool = False) -> Sizes:
    """Try every condition of a graph on its other side: does the model take such sizes, and is the graph right there?

    A condition that makes no difference is dropped. A condition that divides the sizes that the model takes is refused;
    if it is on the sizes of images, or holds for all texts that the model is made for, it is only reported.

    Raises:
        PeftfxError: the graph is right on one side of a branch in the model's code, and the model takes the other;
            not with `allow_fixed`.
    """
    limits, probes = list[Limit](), list[Sized]()
    known: dict[tuple[tuple[str, int], ...], str] = {}
    for condition in (*trial.graph.conditions, *trial.graph.filled):
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
        if why == BRANCHES and trial.is_of_long_texts(condition):
            why = LONGER
        if why == BRANCHES and not allow_fixed and not trial.is_of_images(condition):
            raise _refusal(condition, condition in trial.graph.filled)
        limits += [Limit(condition, why)] if why else []
        if not condition.edge:  # a size of 1 is always verified
            probes += [sizes for sizes, answer in zip(tried, answers, strict=True) if answer == _SAME][:1]
            last = _last(condition, around)
            probes += [sizes for sizes in last if _REFUSED not in answers or trial.takes(sizes)]
    found = Sizes(tuple(limits))
    probes = [sizes for sizes in probes if found.allow(sizes) and trial.affords(sizes)]
    return Sizes(found.limits, tuple(sizes for i, sizes in enumerate(probes) if sizes not in probes[:i]))


def _refusal(condition: Condition, first: bool) -> PeftfxError:
    """Return the error for a condition that divides the calls that a model takes; `first` divides off a first call."""
    what = "the model's code branches on a size"
    hint = "export with inputs=... of the sizes you will serve and --allow-fixed (allow_fixed=True), or rewrite it"
    if first:
        what = "the model's code computes something else for the first tokens of a text than for the tokens behind them"
        hint = "use the forward view"
    return PeftfxError(f"{what}: this export would be right only where {condition}", condition.where, hint)


def _verdict(answers: Sequence[str]) -> str:
    if not answers:
        return UNTRIED
    why = next((why for why in (BRANCHES, _SAME, _REFUSED) if why in answers), _UNREACHED)
    return why if why in (BRANCHES, _REFUSED) else ""


def _last(condition: Condition, around: Sequence[Sized]) -> Iterator[Sized]:
    """Yield sizes that just meet a condition: the next size of an axis does not."""
    for sizes in around:
        steps = ({**sizes, axis: sizes[axis] + step} for axis in condition.axes for step in (1, -1))
        if condition.met(sizes) and not all(condition.met(next_to) for next_to in steps if min(next_to.values()) > 0):
            yield sizes
            return


def _related(relation: Condition, sizes: Sized, chosen: Sized) -> dict[str, int]:
    """Return the size of an axis that follows from the chosen sizes by a relation."""
    values = {sympy.Symbol(axis, integer=True, positive=True): sympy.Integer(size) for axis, size in sizes.items()}
    left, right = relation.holds.args
    for axis, value in ((left, right), (right, left)):
        number = value.xreplace(values)
        if axis.is_Symbol and str(axis) not in chosen and number.is_Integer:
            return {str(axis): int(number)}
    return {}


def _same(want: Tensor, got: Tensor, shown: Callable[[Tensor], Tensor], bound: float | None = None) -> bool:
    half = want.dtype in (torch.float16, torch.bfloat16)
    usual = 2e-2 if half else 1e-4
    return want.shape == got.shape and near(shown(want), shown(got), usual if bound is None else bound)
