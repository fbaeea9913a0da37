"""Find the sizes at which an export is right, by comparing its capture with the model's own code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftfx.bases.config_fields import length_of
from peftfx.export.verification.comparison import Shown
from peftfx.export.verification.probes import case_of, eager_forward, eager_view, is_large, tensors_in
from peftfx.export.verification.sizes import Eager, Make, Sizes, Trial, find_sizes
from peftfx.graph.contexts import unchanged
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.views.arguments import nested
from peftfx.views.view import View, without_cache


def sizes_of(
    adapted: AdaptedModel, view: View | None, example: Mapping[str, object], *, allow_fixed: bool = False
) -> Sizes:
    """Find the sizes at which the export of a view, or of the forward, is right.

    Raises:
        PeftfxError: the export is right only on one side of a branch in the model's code; not with `allow_fixed`.
    """
    trial = _of_forward(adapted, example) if view is None else _of_view(adapted, view)
    return find_sizes(trial, allow_fixed=allow_fixed)


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
