"""The sizes at which an export is right. Each condition of its capture is tried on the other side, in eager code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.verification.sizes.trial import (
    BRANCHES,
    DECLARES,
    SAME,
    TAKES_NO_OTHER,
    TAKES_ONE,
    Sized,
    Trial,
)
from peftfx.graph.conditions import Condition, unmet
from peftfx.graph.decisions import Decision, opposed

UNTRIED = "what is beyond is too large to be tried here"
LONGER = "the model is made for no more tokens"
_UNREACHED = "no such call can be made"
_TRIALS = 3  #: how many sizes are tried on the other side of a condition
_NEAR = 2  #: how many more, if the model takes none of these


class OneSidedError(PeftfxError):
    """Raised when a capture is right on one side of a branch in the model's code, and the model takes the other.

    Attributes:
        condition: says at which sizes the capture is right.
    """

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        what = f"the model's code branches on a size: this export would be right only where {condition}"
        hint = "export with inputs=... of the sizes you will serve and --allow-fixed (allow_fixed=True), or rewrite it"
        super().__init__(what, condition.where, hint)


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

    def carried(self, conditions: Collection[Condition], alike: Callable[[Condition, Condition], bool]) -> Sizes:
        """Return these sizes with other conditions of the same code, each for the reason of a limit that it is like.

        Args:
            conditions: the conditions of a graph with more places than the one whose limits these are.
            alike: says whether a limit's condition (the first) and another one are of the same code.
        """
        known = {limit.condition for limit in self.limits}
        more = (
            Limit(condition, limit.why)
            for limit in self.limits
            for condition in conditions
            if condition not in known and alike(limit.condition, condition)
        )
        return dataclasses.replace(self, limits=(*self.limits, *dict.fromkeys(more)))

    def serve(self, case: Mapping[str, Tensor]) -> bool:
        """Say whether the export has the sides of the branches that these inputs take."""
        return not opposed(self.sides, case)


EVERY = Sizes()


def find_sizes(trial: Trial, *, allow_fixed: bool) -> Sizes:
    """Try every condition of a graph on its other side: does the model take such sizes, and is the graph right there?

    A condition that makes no difference is dropped. A condition that divides the sizes that the model takes is refused.
    It is only reported if it is on the sizes of images, holds for all texts that the model is made for, or holds for
    most lengths of recordings.

    Raises:
        OneSidedError: the graph is right on one side of a branch in the model's code, and the model takes the other;
            not with `allow_fixed`.
        PeftfxError: so it is for the first tokens of a text.
    """
    limits, probes = list[Limit](), list[Sized]()
    shared: list[tuple[Condition, Sized]] = []  #: where the graph is wrong, and more than one condition does not hold
    known: dict[tuple[tuple[str, int], ...], str] = {}

    def answer(condition: Condition, sizes: Sized) -> str:
        key, case = tuple(sorted(sizes.items())), trial.reach(condition, sizes)
        if case is not None and key not in known:
            known[key] = trial.answer(case, condition)
        return _UNREACHED if case is None else known[key]

    for condition in (*trial.graph.conditions, *trial.graph.filled):
        if condition.relation or condition.below:
            limits.append(Limit(condition, TAKES_ONE if _takes_one(trial, condition) else TAKES_NO_OTHER))
            probes += _last(condition, [trial.whole(sizes) for sizes in condition.tried()]) if condition.below else ()
            continue
        around = [trial.whole(sizes) for sizes in condition.tried()]
        tried = _try(trial, condition, around, answer)
        why = _verdict(tried)
        if why == BRANCHES and trial.is_of_long_texts(condition):
            why = LONGER
        told = trial.is_of_images(condition) or trial.is_of_most_sounds(condition)
        if why == BRANCHES and not allow_fixed and not told:
            shared += [(condition, sizes) for sizes in _wrong_with_others(trial, condition, tried)]
            tried = [(sizes, found) for sizes, found in tried if found != BRANCHES]
            why = _verdict(tried)
        limits += [Limit(condition, why)] if why else []
        probes += _near_the_bound(trial, condition, around, tried)
    found = Sizes(tuple(limits))
    for condition, sizes in shared:
        if found.allow(sizes):  # no other condition was refused, or is told, for these
            raise _refused(condition, condition in trial.graph.filled)
    probes = [sizes for sizes in probes if found.allow(sizes) and trial.affords(sizes)]
    return Sizes(found.limits, tuple(sizes for i, sizes in enumerate(probes) if sizes not in probes[:i]))


def _takes_one(trial: Trial, condition: Condition) -> bool:
    """Return whether two axes are to be equal, and the model's own code runs where one of them is 1.

    A capture finds them equal where torch's operators broadcast: it assumes that no size is 1.
    """
    if not condition.is_equality:
        return False
    usual = {axis: size for axis, size in trial.whole({}).items() if axis in condition.axes}
    ones = (trial.whole({**usual, axis: 1}) for axis in usual)
    return any(not condition.met(sizes) and trial.takes(sizes) for sizes in ones)


def _try(
    trial: Trial, condition: Condition, around: Sequence[Sized], answer: Callable[[Condition, Sized], str]
) -> list[tuple[Sized, str]]:
    """Return sizes for which a condition does not hold, each with what `answer` says of the model there."""
    beyond = [sizes for sizes in around if not condition.met(sizes)]
    far = [sizes for sizes in beyond if trial.affords(sizes) and trial.tells(condition, sizes)][:_TRIALS]
    tried = [(sizes, answer(condition, sizes)) for sizes in far]
    if tried and {found for _, found in tried} <= {TAKES_NO_OTHER, _UNREACHED}:  # it may take some near the example's
        for sizes in map(trial.whole, condition.broken_near(trial.graph.sizes)):
            if len(tried) == len(far) + _NEAR:
                break
            if all(sizes != seen for seen, _ in tried) and trial.affords_near(sizes) and trial.tells(condition, sizes):
                tried.append((sizes, answer(condition, sizes)))
    return tried


def _wrong_with_others(trial: Trial, condition: Condition, tried: Sequence[tuple[Sized, str]]) -> list[Sized]:
    """Return the sizes at which the graph is wrong, if at each of them another condition does not hold either.

    Raises:
        PeftfxError: the condition alone does not hold at one of them, or the graph is right at none of the sizes.
    """
    wrong = [sizes for sizes, found in tried if found == BRANCHES]
    others = trial.graph.conditions
    if len(wrong) == len(tried) or not all(_broken_beside(condition, others, sizes) for sizes in wrong):
        raise _refused(condition, condition in trial.graph.filled)
    return wrong


def _near_the_bound(
    trial: Trial, condition: Condition, around: Sequence[Sized], tried: Sequence[tuple[Sized, str]]
) -> Iterator[Sized]:
    """Yield sizes on both sides of a condition at which the export has to be right."""
    if condition.edge:  # a size of 1 is always verified
        return
    yield from [sizes for sizes, found in tried if found == SAME][:1]
    takes_all = all(found != TAKES_NO_OTHER for _, found in tried)
    yield from (sizes for sizes in _last(condition, around) if takes_all or trial.takes(sizes))


def _refused(condition: Condition, first: bool) -> PeftfxError:
    """Return the error for a condition that divides the calls that a model takes; `first` divides off a first call."""
    if not first:
        return OneSidedError(condition)
    what = "the model's code computes something else for the first tokens of a text than for the tokens behind them"
    where = f"this export would be right only where {condition}"
    return PeftfxError(f"{what}: {where}", condition.where, "use the forward view")


def _broken_beside(condition: Condition, conditions: Sequence[Condition], sizes: Sized) -> bool:
    """Return whether another condition on a branch does not hold at these sizes, so that it may be the one to blame."""
    others = (c for c in conditions if c != condition and not (c.relation or c.below))
    return any(not other.met(sizes) for other in others)


def _verdict(tried: Sequence[tuple[Sized, str]]) -> str:
    """Return why a condition has to hold, by what was found at sizes for which it does not; empty if it need not."""
    answers = [found for _, found in tried]
    if not answers:
        return UNTRIED
    why = next((why for why in (BRANCHES, DECLARES, SAME, TAKES_NO_OTHER) if why in answers), _UNREACHED)
    return why if why in (BRANCHES, DECLARES, TAKES_NO_OTHER) else ""


def _last(condition: Condition, around: Sequence[Sized]) -> Iterator[Sized]:
    """Yield sizes that just meet a condition: the next size of an axis does not."""
    for sizes in around:
        steps = ({**sizes, axis: sizes[axis] + step} for axis in condition.axes for step in (1, -1))
        if condition.met(sizes) and not all(condition.met(next_to) for next_to in steps if min(next_to.values()) > 0):
            yield sizes
            return
