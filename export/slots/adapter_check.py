"""Check a written `.onnx_adapter`: ONNX Runtime with it computes what torch computes under the adapters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftfx.errors import warn
from peftfx.export.slots.adapter_tensors import unrounded_prefix
from peftfx.export.slots.reopened import reopened
from peftfx.export.slots.served_as import served_as
from peftfx.export.verification.comparison import but_near_ties
from peftfx.export.verification.oracle import eager_oracle
from peftfx.export.verification.sizes.search import sizes_of
from peftfx.export.verification.tolerances.rounded_numbers import with_rounded_numbers
from peftfx.export.verification.tolerances.sigmoids import made_by_sigmoids
from peftfx.export.verification.verify import verify
from peftfx.export.verification.without_rounding import (
    CodeAndGraph,
    hold_without_rounding,
    runs_without_rounding,
)
from peftfx.graph.slots import PREFIX, Manifest, Slot
from peftfx.model.adapted import AdaptedModel
from peftfx.serving.adapter_file import file_of, read_adapter_file

MORE = 4  #: times the error of a quantised graph with random adapters: an adapter's that is larger is told


def in_slot_dtypes(tensors: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Return the tensors for slots in the dtypes of the slots."""
    return {name: value.to(getattr(torch, slots[name].dtype)) for name, value in tensors.items()}


def check_adapter(
    adapted: AdaptedModel,
    directory: Path,
    manifest: Manifest,
    name: str,
    tensors: Mapping[str, Tensor],
    example: Mapping[str, object] | None,
    path: Path,
) -> None:
    """Run one exported graph with a written adapter, and compare it with torch.

    A model in half precision is also compared without rounding, if its graph can be captured again with its slots: see
    `peftfx.export.verification.without_rounding`.

    Args:
        adapted: the base with the adapters.
        directory: the directory of the graph.
        manifest: the slots of the graphs.
        name: the stem of the graph's file.
        tensors: what the adapters put into its slots, before it is rounded to their dtypes.
        example: the arguments of a forward call, if they are not the model's own example.
        path: the written adapter.

    Raises:
        VerificationError: ONNX Runtime and torch disagree.
    """
    view, graph = served_as(adapted, directory, name, manifest.views[name], example)
    given = adapted.example if example is None else example
    oracle = eager_oracle(adapted, graph, view, given, sizes_of(adapted, view, given, allow_fixed=True))
    put = read_adapter_file(file_of(path, name, tuple(manifest.views)))[1]
    file, shown = directory / f"{name}.onnx", None if view is None else view.shown
    lost, rtol = manifest.lost, manifest.rtol
    exactly = lost is None and manifest.atol is None and rtol is None and runs_without_rounding(adapted.base)
    stored = in_slot_dtypes(tensors, manifest.of(name))
    plain = reopened(adapted, manifest, name, stored, example) if lost is not None or exactly else None
    if lost is not None and plain is None and rtol is not None:
        rtol = min(rtol, MORE * lost)
    compare = functools.partial(
        verify,
        *(file, oracle.reference, oracle.cases),
        atol=manifest.atol,
        rtol=rtol,
        measured=oracle.measured,
        shown=shown,
        put=put,
        unrounded=None if lost is None else plain,
    )
    hold = None
    if exactly and plain is not None:
        exact = plain.holding(_exact(adapted, tensors))
        hold = functools.partial(
            hold_without_rounding,
            file,
            CodeAndGraph(oracle.reference, exact, CodeAndGraph(oracle.reference, plain)),
            plain.of(with_rounded_numbers(plain.graph)),
            oracle.largest,
            shown=shown,
            sigmoids=made_by_sigmoids(plain.graph),
            put=put,
        )
    found = but_near_ties(compare, graph, rounds=lost is not None, without_rounding=hold)
    _tell_loss(max((c.max_rel for c in found), default=0.0), lost, path)


def _exact(adapted: AdaptedModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors for slots with the prefix of virtual tokens in float64: it is computed in the model's dtype."""
    prefix = unrounded_prefix(adapted) if PREFIX in tensors else None
    return tensors if prefix is None else {**tensors, PREFIX: prefix}


def _tell_loss(worst: float, lost: float | None, path: Path) -> None:
    """Warn if a graph with rounded weights loses much more under an adapter than under random ones."""
    if lost is not None and worst > MORE * lost:
        told = f"with this adapter the quantised graph is {worst:.2g} of the largest output from torch"
        warn(f"{path.name}: {told}, and {lost:.2g} with random adapters: compare the quality of what it gives")
