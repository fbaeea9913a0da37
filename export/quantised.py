"""Round an export's weights, and measure the cost: compare each part with the floating-point model on a text."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxError, how_many, listed, warn
from peftfx.export.coded.rounded import (
    IN_BFLOAT16,
    Choose,
    columns_of,
    left_out,
    multiplied_in,
    quantize,
    read_weight,
    roundable,
)
from peftfx.export.coded.schemes import ROUTER_LEFT, routers_in, scheme_for
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.metadata import SOURCE
from peftfx.export.reports.facts import add_quantized
from peftfx.export.reports.report import Report
from peftfx.export.rounding.budget import candidates, share_out
from peftfx.export.rounding.calibrated import Candidate, fit_weights, paths_of
from peftfx.export.rounding.texts import compared_text, split_text, whole_call
from peftfx.export.verification.agreement import Agreement, agreement, texts
from peftfx.export.verification.cases import PROBE_SIZES
from peftfx.export.verification.comparison import Comparison, Reference, VerificationError
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.oracle import Oracle, named_in
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export_options.export import ExportOptions
from peftfx.export_options.quantize import BLOCKS, Scheme
from peftfx.export_options.values import MaxError
from peftfx.model.adapted import AdaptedModel
from peftfx.quantisation.rounding import Rounded
from peftfx.serving.onnx_model import OnnxModel
from peftfx.sites.sites import Sites
from peftfx.views.row_adapters import WithRowAdapters


class _Told(Protocol):
    """A report that says how far a quantised model agrees with the floating-point model."""

    @property
    def agreement(self) -> dict[str, Agreement]:
        """The measured agreement, by the names of the parts."""


def round_weights(
    asked: ExportOptions,
    adapted: AdaptedModel,
    parts: Sequence[GraphPart],
    programs: Mapping[str, ir.Model],
    oracle: Callable[[GraphPart], Oracle],
    source: str | Path,
    report: Report,
    beside: Path,
    *,
    merged: bool,
) -> None:
    """Round the weights of ONNX programs, by the schemes asked for or within a budget of bytes.

    Args:
        asked: the export's options, which ask for rounded weights.
        adapted: the model that is exported.
        parts: the graphs of the export.
        programs: the ONNX program of each part, by its file name; changed in place.
        oracle: gives the oracle that a part is compared with.
        source: the base's directory, which has the tokenizer for a text.
        report: gets what was rounded, and what was not.
        beside: a directory on the disk where temporary files may be kept.
        merged: whether the adapters were folded into the weights.

    Raises:
        PeftfxError: the budget is too small, the text is unusable, or no weight is rounded.
    """
    made, untold = dict[object, Rounded](), None
    if asked.room is None:
        chosen = {part.file: scheme_for(part.graph.sites, asked.schemes) for part in parts}
        if any(scheme.gptq for scheme in asked.schemes):
            assert asked.calibration is not None
            given = Path(asked.calibration)
            ids, _ = split_text(given, source)
            found = [c for part in parts for c in _candidates(programs[part.file], part.graph.sites, chosen[part.file])]
            made, report.gptq = fit_weights(adapted, ids, given.name, found, beside, merged=merged)
            report.gptq.left |= {n: w for part in parts for n, w in _stacks(programs[part.file], chosen[part.file])}
    else:
        with adapted.disable_adapter() if asked.batched else nullcontext():  # rows share only the base
            reference, feeds = _calls(asked, adapted, parts, oracle, source)
            choose, untold, report.budget = share_out(
                *(asked.room, [(programs[part.file], part.graph.sites) for part in parts], adapted, reference, feeds),
                candidates(),
            )
        chosen = dict.fromkeys(programs, choose)
    multiplied = {file: multiplied_in(program) for file, program in programs.items()}
    owners = {source: file for file, sources in multiplied.items() for source in sources}

    def scheme_of(file: str, source: object) -> Scheme | None:
        """Return a weight's scheme. If two graphs share the weight, the graph that multiplies by it decides."""
        return chosen[file if source in multiplied[file] else owners.get(source, file)](source)

    done = {f: quantize(programs[f], functools.partial(scheme_of, f), made, owners) for f in chosen}
    add_quantized(report, done)
    left = {f: left_out(programs[f], untold or functools.partial(scheme_of, f)) for f in chosen}
    if asked.room is None and any(not scheme.target and scheme.kind != "none" for scheme in asked.schemes):
        for part in parts:
            left[part.file] |= _left_routers(programs[part.file], part.graph.sites, chosen[part.file])
    report.left = {file: found for file, found in left.items() if found}
    if not any(weights for by in done.values() for weights in by.values()):
        raise _rounds_none(asked, left)


def _rounds_none(asked: ExportOptions, left: Mapping[str, Mapping[str, str]]) -> PeftfxError:
    """Return the error for an export of which no weight is rounded; `left` says why, by files and weights."""
    reasons = Counter(why for found in left.values() for why in found.values()).most_common(1)
    why = "".join(f": of {how_many(count, 'weight')}, {reason}" for reason, count in reasons)
    what = f"{', '.join(map(str, asked.schemes)) or 'the budget'} rounds no weight of this model{why}"
    smaller = "choose a smaller block, other roles, or no quantisation"
    return PeftfxError(what, "quantize", "export model.float()" if IN_BFLOAT16 in why else smaller)


def _left_routers(program: ir.Model, sites: Sites, choose: Choose) -> dict[str, str]:
    """Return why routers are not rounded, by the names of their weights."""
    sources = {source for source in routers_in(sites) if choose(source) is None}
    weights = program.graph.initializers.values()
    return {str(weight.name): ROUTER_LEFT for weight in weights if weight.meta.get(SOURCE) in sources}


def _calls(
    asked: ExportOptions,
    adapted: AdaptedModel,
    parts: Sequence[GraphPart],
    oracle: Callable[[GraphPart], Oracle],
    source: str | Path,
) -> tuple[Reference, list[Tensors]]:
    """Return the reference and the calls that a budget is measured by.

    If the export has several graphs, or its adapters are chosen when it runs, this is the forward call of the whole
    model.
    """
    text = asked.calibration
    ids, named = None if text is None else compared_text(Path(text), source), Path(text or "").name
    if len(parts) == 1 and asked.places is None and not asked.batched:
        part, held = parts[0], oracle(parts[0])
        inputs = [spec.name for spec in part.graph.inputs]
        return held.reference, texts(inputs, adapted, part.seen, held.reference, held.cases, ids, named)[0]
    whole = EagerReference(adapted, None, adapted.example)
    if ids is None:
        sizes = [dict(axes) for axes in PROBE_SIZES[:2]]
        return whole, [example_inputs(adapted.base, sizes=axes, seed=n + 1) for n, axes in enumerate(sizes)]
    return whole, [whole_call(adapted, ids, named)]


def _candidates(program: ir.Model, sites: Sites, choose: Choose) -> Iterator[Candidate]:
    """Yield the weights of a program that GPTQ is asked for."""
    paths = paths_of(sites)
    for weight, transposed, _ in roundable(program, min(BLOCKS)):
        scheme = choose(source := weight.meta.get(SOURCE))
        if scheme is not None and scheme.gptq and columns_of(weight, transposed) >= scheme.block:
            yield Candidate(source, paths(source), functools.partial(read_weight, weight, transposed), scheme)


def _stacks(program: ir.Model, choose: Choose) -> Iterator[tuple[str, str]]:
    """Yield the stacks of weights that GPTQ is asked for, and why GPTQ leaves them."""
    for weight in program.graph.initializers.values():
        scheme = choose(weight.meta.get(SOURCE))
        if scheme is not None and scheme.gptq and weight.shape is not None and len(weight.shape) == 3:
            yield str(weight.name), "a stack of weights, each of which reads tokens of its own"


def agreement_of(
    path: Path, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, source: str | Path, asked: ExportOptions
) -> dict[str, Agreement]:
    """Measure on a text how far a quantised part agrees with the model. Return the result by the part's name."""
    model = OnnxModel(path, mapped=True)
    text = asked.calibration
    ids = None if text is None else compared_text(Path(text), source, asked.schemes)
    view, reference = part.seen, oracle.reference
    if asked.places is not None:  # a call on a text leaves the slots empty
        takes = {spec.name for spec in part.graph.inputs}
        filled, empty = reference, named_in(part.graph, EagerReference(adapted, view))
        reference = lambda feed: (filled if takes <= feed.keys() else empty)(feed)  # noqa: E731
    elif isinstance(part.view, WithRowAdapters):
        if text is not None:
            hint = "leave --calibration out, or export each adapter merged"
            raise PeftfxError("a batched export cannot be compared on a text", str(text), hint)
        view = None
    found = agreement(model, adapted, view, reference, oracle.cases, ids, Path(text or "").name)
    return {} if found is None else {part.stem: found}


def warn_of_lost(found: Sequence[Comparison], file: str) -> None:
    """Warn of outputs that are as far from the model's own as they are large: rounding alone rarely loses so much."""
    lost = []
    for name in dict.fromkeys(c.output for c in found):
        own = [c for c in found if c.output == name]
        most, largest = max(c.max_abs for c in own), max(c.largest for c in own)
        lost += [f"{name}: {most / largest:.2g} times"] if most >= largest > 0 else []
    if lost:
        what = f"{file} differs from the model by more than its outputs are large ({listed(lost)})"
        warn(f"{what}: it may be useless; round fewer layers, or bound the error (max_error=)")


def refuse_disagreement(report: _Told, limit: MaxError | None, text: str | Path | None, where: Path) -> None:
    """Refuse a quantised model that agrees less with the original than was asked for.

    Raises:
        VerificationError: the model agrees less.
        PeftfxError: the model has no logits of classes to measure the agreement by.
    """
    if text is not None and not report.agreement:
        hint = "leave --calibration out: its error is measured at random inputs"
        raise PeftfxError("the model gives no logits of classes to compare on a text", str(text), hint)
    if limit is None or limit.kind == "error":
        return
    if not report.agreement:
        hint = "bound the error over the largest magnitude: max_error=0.1"
        raise PeftfxError(f"the model gives no logits of classes: it has no {limit.kind}", "max_error", hint)
    worst = next((a for a in report.agreement.values() if not a.within(limit)), None)
    if worst is not None:
        what = f"quantisation costs more than {limit.kind}={limit.value:g}: {worst}"
        hint = "quantise fewer weights or with more bits, or allow more (--max-error)"
        raise VerificationError(what, str(where), hint)
