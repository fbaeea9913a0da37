"""Check a directory that a merge wrote: its numbers one by one, and what the model computes that is loaded from it.

The outputs of a model in bfloat16 say little about a single weight: rounding all weights changes them as much as a lost
update of one layer. So a merge is held to two exact things. In float32, before they are rounded, the merged weights
compute what the base and its unmerged adapter compute. And each number in the files is the rounded number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.deferred import Deferred, computing
from peftfx.bases.dtypes import dtype_plan
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.export.checkpoint.contents import written_tensors
from peftfx.export.checkpoint.merged_report import Difference, MergedReport
from peftfx.export.checkpoint.requantised import Requantised
from peftfx.export.coded.rounded import FINITE
from peftfx.export.verification.cases import (
    FEW,
    ONE,
    PROBE_SIZES,
    is_heavy,
    is_large,
    with_few_rows,
    with_trained_tokens,
)
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.tolerances.masked import relative_difference
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export.writing.read_back import count_wrong
from peftfx.export_options.merge import MergeOptions
from peftfx.graph.lazy_weights import exact
from peftfx.model.adapted import AdaptedModel

#: How far an output in float32 may differ, relative to its largest magnitude: two orders of the same sums.
_BOUND = 1e-3


@torch.no_grad()
def check_merge(
    directory: Path,
    adapted: AdaptedModel,
    merged: nn.Module,
    report: MergedReport,
    asked: MergeOptions,
    rounded: Requantised | None,
) -> tuple[AdaptedModel, list[dict[str, Tensor]]]:
    """Load the written model, and compare it with the base and its unmerged adapter, at sizes not seen before.

    The error that rounding causes is measured. Where weights are quantised, it is bounded as the options say.

    Args:
        directory: the directory that was written.
        adapted: the base with its unmerged adapter, in float32.
        merged: the merged model whose weights were written, with `Deferred` parameters.
        report: gets the differences.
        asked: the options of the merge.
        rounded: the layers that were quantised, if any.

    Returns:
        The loaded model, and the inputs that it was compared on.

    Raises:
        VerificationError: the files have other numbers, the merged weights compute something else, or quantising costs
            more than the options allow.
        PeftfxError: the model's code does not take the inputs that were made for it.
    """
    loaded = load_base(directory, task=None, dtype=torch.float32)
    if rounded is not None:
        rounded.check(loaded, str(directory))
    dtype: torch.dtype = getattr(torch, report.dtype)
    packed = {f"{path}.weight" for path in (() if rounded is None else rounded.packings)}
    _compare_numbers(loaded, merged, dtype, packed, str(directory))
    again = AdaptedModel.on(loaded, adapted.sites, adapted.example)
    whole = AdaptedModel.on(merged, adapted.sites, adapted.example)
    want, got, unrounded = (EagerReference(model, None, model.example) for model in (adapted, again, whole))
    feeds, exactly, large = list[dict[str, Tensor]](), list[Difference](), is_large(adapted.base)
    tried = FEW if large else PROBE_SIZES[:2]
    heavy = is_heavy(adapted.whole_graph(adapted=False))
    for number, sizes in enumerate(with_few_rows(tried, ONE) if heavy else tried):
        made = example_inputs(adapted.base, sizes=sizes, seed=number + 1)
        feeds.append(feed := with_trained_tokens(made, adapted, number))
        wanted = _called(want, feed)
        report.differences += _differences(feed, wanted, got(feed))
        if (packed or dtype != torch.float32) and not (large and exactly):  # a call computes all merged weights anew
            with computing():
                exactly += _differences(feed, wanted, unrounded(feed))
    if exactly:
        _refuse_beyond(
            _BOUND, exactly, "of the merged model, before its weights are rounded,", directory, "report this model"
        )
    limit = asked.bound
    if rounded is not None:
        bound = limit.value if limit is not None and limit.kind == "error" else FINITE
        hint = "round to int8, or allow more"
    elif exactly:  # what rounds to a float is what the caller asked for, and a report tells it; an overflow is an error
        bound, hint = FINITE, "write it in float32"
    else:
        bound, hint = _BOUND, "report this model"
    _refuse_beyond(bound, report.differences, "of what was written", directory, hint)
    return again, feeds


def _called(reference: EagerReference, feed: Tensors) -> Tensors:
    try:
        return reference(feed)
    except PeftfxError:
        raise
    except Exception as error:  # a model's code raises various errors for inputs that it does not take
        raise_if_memory_is_out(error)
        what = f"the model does not take the inputs that were made to compare it: {first_line(error)}"
        hint = "merge it in Python: peftfx.load(model, adapter, inputs=...).merge_and_unload(), and save_pretrained"
        raise PeftfxError(what, type(reference.adapted.base).__name__, hint) from error


def _compare_numbers(
    loaded: nn.Module, merged: nn.Module, dtype: torch.dtype, packed: Collection[str], where: str
) -> None:
    """Compare each number of a loaded model with the merged number, which is computed once more.

    Raises:
        VerificationError: a number is not the nearest one in its dtype.
    """
    found, planned = loaded.state_dict(keep_vars=True), dtype_plan(merged, dtype)
    for name, tensor in written_tensors(merged).items():  # type: ignore[arg-type]
        if name in packed:
            continue
        if name not in found:
            raise VerificationError(f"{name} is not there when the model is loaded again", where, "report this model")
        whole = tensor.detach()
        want, got = (t.value() if isinstance(t, Deferred) else exact(t) for t in (whole, found[name].detach()))
        own = planned(name) if want.is_floating_point() else want.dtype
        wrong = count_wrong(got, want, own, computed=isinstance(whole, Deferred))
        if wrong:
            what = f"{wrong:,} of {want.numel():,} numbers of {name} are not the merged ones"
            raise VerificationError(what, where, "report this model")


def _refuse_beyond(bound: float, differences: Sequence[Difference], which: str, directory: Path, hint: str) -> None:
    worst = max(differences, key=lambda d: d.max_rel)
    if not worst.max_rel <= bound:
        what = f"{worst.output} {which} is {worst.max_rel:.2g} of its largest magnitude off"
        raise VerificationError(what, str(directory), hint)


def _differences(feed: Tensors, want: Tensors, got: Tensors) -> list[Difference]:
    shapes = {name: list(value.shape) for name, value in feed.items()}
    return [_difference(name, shapes, value, got.get(name)) for name, value in want.items()]


def _difference(name: str, shapes: dict[str, list[int]], want: Tensor, got: Tensor | None) -> Difference:
    if got is None or got.shape != want.shape:
        return Difference(name, shapes, float("inf"), float("inf"))
    if not want.numel():
        return Difference(name, shapes, 0.0, 0.0)
    want, got = want.double(), got.double()
    finite = want.isfinite() & got.isfinite()
    alike = (got == want) | (got.isnan() & want.isnan())  # infinities too: scores of classes that do not exist, say
    if not bool((alike | finite).all()):
        return Difference(name, shapes, math.inf, math.inf)
    want, got = want[finite], got[finite]
    off = float((got - want).abs().max()) if want.numel() else 0.0
    return Difference(name, shapes, off, relative_difference(want, got))
