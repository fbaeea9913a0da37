"""Find the calls for which an export is right, by comparing its capture with the model's own code."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from peftfx.bases.config_fields import length_of
from peftfx.errors import PeftfxError
from peftfx.export.verification.captured import eager_forward, eager_view, tensors_in
from peftfx.export.verification.cases import ONE, case_of, is_heavy, is_large
from peftfx.export.verification.comparison import Shown
from peftfx.export.verification.sizes.limits import Sizes, find_sizes
from peftfx.export.verification.sizes.trial import BRANCHES, Eager, Make, Sized, Trial
from peftfx.graph.conditions import Condition, have_rests
from peftfx.graph.contexts import unchanged
from peftfx.graph.decisions import Decision
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.views.arguments import nested
from peftfx.views.entry import Entry
from peftfx.views.view import View, as_captured, name_axes

#: Sizes of the tried calls. One row is not padded, and of several rows the last is, if the text is long enough.
_TRIED: tuple[Sized, ...] = (
    {"batch": 1},
    {},
    {"batch": 3, "sequence": 5, "encoder_sequence": 5, "decoder_sequence": 4},
    {"batch": 2, "sequence": 9, "encoder_sequence": 9, "decoder_sequence": 8},
)


def sizes_of(
    adapted: AdaptedModel,
    view: View | None,
    example: Mapping[str, object],
    *,
    allow_fixed: bool = False,
    brief: bool = False,
) -> Sizes:
    """Find the sizes at which the export of a view, or of the forward, is right.

    With `brief`, the graph of a large model's forward is not run at sizes of 1, at which its export will be compared: a
    run reads all weights.

    Raises:
        PeftfxError: the export is right only on one side of a branch in the model's code, on a size or on a boolean of
            its inputs; not with `allow_fixed`.
    """
    trial = _of_forward(adapted, example) if view is None else _of_view(adapted, view)
    if brief and view is None and is_large(adapted.base):
        trial = dataclasses.replace(trial, left=frozenset(ONE))
    sides = _fixed_sides(trial, allow_fixed=allow_fixed)
    fixed = tuple(_fixed_axes(trial)) if view is None else ()
    return dataclasses.replace(find_sizes(trial, allow_fixed=allow_fixed), sides=sides, fixed=fixed)


def examples_beyond(
    adapted: AdaptedModel, example: Mapping[str, object], condition: Condition
) -> Iterator[dict[str, object]]:
    """Yield a few examples on the other side of a condition, in whose captures the same axes are free.

    Where the code divides sizes, the first example has a rest in every division: code that fills up the last window of
    one layer does so in the others too.
    """
    graph = adapted.graphs.captured(example, adapted.entry())
    tried = (sizes for sizes in condition.tried() if min(sizes.values()) >= _FREE and not condition.met(sizes))
    near = itertools.islice(condition.broken_near(graph.sizes), _ASKED)
    with_rests = (sizes for sizes in near if have_rests(graph.conditions, {**graph.sizes, **sizes}))
    for sizes in (*itertools.islice(with_rests, 1), *itertools.islice(tried, _OTHER_SIDES)):  # each is a capture
        with suppress(PeftfxError):
            other = nested(case_of(adapted, graph.inputs, example, {**graph.sizes, **sizes}, 0), example)
            if adapted.graphs.captured(other, adapted.entry()).inputs == graph.inputs:
                yield other


_OTHER_SIDES = 2
_ASKED = 128  #: how many sizes near the example's are asked for rests
_FREE = 3  #: the least size that a capture takes for one of many


def _of_forward(adapted: AdaptedModel, example: Mapping[str, object]) -> Trial:
    entry = adapted.entry()
    graph = adapted.graphs.captured(example, entry)

    def eager(case: dict[str, Tensor]) -> list[Tensor]:
        with unchanged(adapted.base), as_captured(adapted.base), torch.no_grad():
            return tensors_in(eager_forward(adapted, nested(case, example)))

    def make(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return case_of(adapted, graph.inputs, example, sizes, 0)

    return _trial(adapted, graph, make, eager, lambda name, case, value: value, entry)


def _of_view(adapted: AdaptedModel, view: View) -> Trial:
    seen, entry = adapted.under_prompt(view)
    graph = adapted.graphs.captured(seen.inputs(adapted.base), entry, seen)

    def eager(case: dict[str, Tensor]) -> list[Tensor]:
        with unchanged(adapted.base), as_captured(adapted.base), torch.no_grad():
            return list(eager_view(seen, entry, adapted.base, case).values())

    def make(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return seen.inputs(adapted.base, sizes=sizes)

    return _trial(adapted, graph, make, eager, view.shown, entry)


def _trial(adapted: AdaptedModel, graph: Graph, make: Make, eager: Eager, shown: Shown, entry: Entry | None) -> Trial:
    usual = {**graph.sizes, "batch": 1} if is_large(adapted.base) or is_heavy(graph) else graph.sizes
    parameters = sum(p.numel() for p in adapted.base.parameters())
    whole = length_of(getattr(adapted.base, "config", None))
    longest = whole if whole is None or entry is None else whole - entry.shape[0]  # virtual tokens are tokens, too
    return Trial(graph, make, eager, shown, usual, parameters, longest)


def _fixed_sides(trial: Trial, *, allow_fixed: bool) -> tuple[Decision, ...]:
    """Return the decisions of a graph that no call has shown to make no difference.

    A decision for which no call of the other side can be made here stays. The export then refuses such calls.

    Raises:
        PeftfxError: the model computes something else for a call of the other side; not with `allow_fixed`.
    """
    found = []
    for decision in (d for d in trial.graph.decisions if d.inputs):  # others are the same in every call
        answers = [trial.answer(case) for case in _others(trial, decision, _TRIED)]
        if BRANCHES in answers and not allow_fixed:
            hint = "export with inputs=... of the calls you will serve and --allow-fixed (allow_fixed=True)"
            what = f"the model's code branches on a value: this export would be right only where {decision}"
            raise PeftfxError(what, decision.where, hint)
        if not answers and trial.longest:  # what only the longest text decides is told, and not refused
            longest = {"batch": 1, "sequence": trial.longest - trial.usual.get("past", 0)}
            answers = [trial.answer(case) for case in _others(trial, decision, [longest])]
        if not answers or BRANCHES in answers:
            found.append(decision)
    return tuple(found)


def _fixed_axes(trial: Trial) -> Iterator[str]:
    """Yield a line for each axis that the capture fixed at the example's size, though the model takes a longer one.

    Most fixed sizes are the model's own: its weights take no other. A loop in the model's code fixes the number of its
    steps.
    """
    case = trial.make(trial.whole({}))
    asked = name_axes(case)
    fixed = [
        (spec.name, i)
        for spec in trial.graph.inputs
        for i, (size, name) in enumerate(zip(spec.shape, asked[spec.name], strict=True))
        if isinstance(size, int) and name is not None
    ]
    sizes = {(name, i): case[name].shape[i] for name, i in fixed}
    known = sorted({2, *(size for tensor in case.values() for size in tensor.shape)} - {1})
    for axis, size in sizes.items():
        alike = [other for other in sizes if sizes[other] == size]
        longer = [size + 1] if size > 1 else known
        tried = [dict.fromkeys(axes, n) for n in longer for axes in ([axis], alike)]
        for other in sizes:  # one may follow from the other in the code, as twice its size, or one more
            if 1 in (size, sizes[other]) and sizes[other] != size:
                tried += [{axis: 2 * size, other: 2 * sizes[other]}, {axis: size + 1, other: sizes[other] + 1}]
        if any(trial.runs(functools.partial(_resized, case, others)) for others in tried):
            which = f"axis {axis[1]} of {axis[0]} is {size}"
            yield f"{which} (as in the example: the capture fixes it; the model takes others)"


def _resized(case: Mapping[str, Tensor], sizes: Mapping[tuple[str, int], int]) -> dict[str, Tensor]:
    """Return inputs in which some axes have another size. Their values are repeated."""
    made = dict(case)
    for (name, i), size in sizes.items():
        made[name] = made[name].index_select(i, torch.arange(size) % made[name].shape[i])
    return made


def _others(trial: Trial, decision: Decision, tried: Sequence[Sized]) -> Iterator[dict[str, Tensor]]:
    """Yield calls of these sizes that take the other side of a branch."""
    for sizes in tried:
        whole = trial.whole({axis: size for axis, size in sizes.items() if axis in trial.graph.sizes})
        if not trial.affords(whole):
            continue
        try:
            case = trial.make(whole)
        except PeftfxError:
            continue
        if trial.graph.mixed(case) is None and not decision.met(case):
            yield case
