"""Find the calls for which an export is right, by comparing its capture with the model's own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from peftfx.bases.config_fields import length_of
from peftfx.errors import PeftfxError
from peftfx.export.verification.comparison import Shown
from peftfx.export.verification.probes import case_of, eager_forward, eager_view, is_large, tensors_in
from peftfx.export.verification.sizes import BRANCHES, Eager, Make, Sized, Sizes, Trial, find_sizes
from peftfx.graph.contexts import unchanged
from peftfx.graph.decisions import Decision
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.views.arguments import nested
from peftfx.views.view import View, without_cache

#: Sizes of the tried calls. One row is not padded, and of several rows the last is, if the text is long enough.
_TRIED: tuple[Sized, ...] = (
    {"batch": 1},
    {},
    {"batch": 3, "sequence": 5, "encoder_sequence": 5, "decoder_sequence": 4},
    {"batch": 2, "sequence": 9, "encoder_sequence": 9, "decoder_sequence": 8},
)


def sizes_of(
    adapted: AdaptedModel, view: View | None, example: Mapping[str, object], *, allow_fixed: bool = False
) -> Sizes:
    """Find the sizes at which the export of a view, or of the forward, is right.

    Raises:
        PeftfxError: the export is right only on one side of a branch in the model's code, on a size or on a boolean of
            its inputs; not with `allow_fixed`.
    """
    trial = _of_forward(adapted, example) if view is None else _of_view(adapted, view)
    sides = _fixed_sides(trial, allow_fixed=allow_fixed)
    return dataclasses.replace(find_sizes(trial, allow_fixed=allow_fixed), sides=sides)


def _of_forward(adapted: AdaptedModel, example: Mapping[str, object]) -> Trial:
    graph = adapted.graphs.captured(example, adapted.entry())

    def eager(case: dict[str, Tensor]) -> list[Tensor]:
        with unchanged(adapted.base), without_cache(adapted.base), torch.no_grad():
            return tensors_in(eager_forward(adapted, nested(case, example)))

    def make(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return case_of(adapted, graph.inputs, example, sizes, 0)

    return _trial(adapted, graph, make, eager, lambda name, case, value: value)


def _of_view(adapted: AdaptedModel, view: View) -> Trial:
    seen, entry = adapted.under_prompt(view)
    graph = adapted.graphs.captured(seen.inputs(adapted.base), entry, seen)

    def eager(case: dict[str, Tensor]) -> list[Tensor]:
        with unchanged(adapted.base), without_cache(adapted.base), torch.no_grad():
            return list(eager_view(seen, entry, adapted.base, case).values())

    def make(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        return seen.inputs(adapted.base, sizes=sizes)

    return _trial(adapted, graph, make, eager, view.shown)


def _trial(adapted: AdaptedModel, graph: Graph, make: Make, eager: Eager, shown: Shown) -> Trial:
    usual = {**graph.sizes, "batch": 1} if is_large(adapted.base) else graph.sizes
    parameters, config = sum(p.numel() for p in adapted.base.parameters()), getattr(adapted.base, "config", None)
    return Trial(graph, make, eager, shown, usual, parameters, length_of(config))


def _fixed_sides(trial: Trial, *, allow_fixed: bool = False) -> tuple[Decision, ...]:
    """Return the decisions of a graph that no call has shown to make no difference.

    A decision for which no call of the other side can be made here stays. The export then refuses such calls.

    Raises:
        PeftfxError: the model computes something else for a call of the other side; not with `allow_fixed`.
    """
    found = []
    for decision in trial.graph.decisions:
        answers = [trial.answer(case) for case in _others(trial, decision)]
        if BRANCHES in answers and not allow_fixed:
            hint = "export with inputs=... of the calls you will serve and --allow-fixed (allow_fixed=True)"
            what = f"the model's code branches on a value: this export would be right only where {decision}"
            raise PeftfxError(what, decision.where, hint)
        if not answers or BRANCHES in answers:
            found.append(decision)
    return tuple(found)


def _others(trial: Trial, decision: Decision) -> Iterator[dict[str, Tensor]]:
    """Yield calls that take the other side of a branch."""
    for sizes in _TRIED:
        whole = trial.whole({axis: size for axis, size in sizes.items() if axis in trial.graph.sizes})
        if not trial.affords(whole):
            continue
        try:
            case = trial.make(whole)
        except PeftfxError:
            continue
        if trial.graph.mixed(case) is None and not decision.met(case):
            yield case
