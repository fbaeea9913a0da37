"""What quantisation costs: each part of an export held against the model in floating point, on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from peftfx.errors import PeftfxError
from peftfx.export.budget import candidates, share_out
from peftfx.export.coded.rounded import quantize
from peftfx.export.coded.schemes import scheme_for
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.report import Report
from peftfx.export.verification.agreement import Agreement, agreement, read_text, texts
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager_reference import EagerReference
from peftfx.export.verification.oracle import Oracle, named_in
from peftfx.export_options.export import ExportOptions
from peftfx.export_options.values import MaxError
from peftfx.model.adapted import AdaptedModel
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.prompt_inputs import WithPromptInputs
from peftfx.views.row_adapters import WithRowAdapters


class _Told(Protocol):
    """A report that says how far a model agrees."""

    @property
    def agreement(self) -> dict[str, Agreement]:
        """By the names of its parts."""


def round_weights(
    asked: ExportOptions,
    adapted: AdaptedModel,
    parts: Sequence[GraphPart],
    programs: Mapping[str, ir.Model],
    oracle: Callable[[GraphPart], Oracle],
    source: str | Path,
    report: Report,
) -> None:
    """Round the weights of programs, by the schemes that were asked for or by a budget.

    Args:
        asked: that weights are rounded.
        adapted: the model.
        parts: of the export.
        programs: of each part, by its file; they are changed.
        oracle: what a part is held against.
        source: of the base, for a text's tokenizer.
        report: is told.

    Raises:
        PeftfxError: the budget is too small, or of a model that is more than one graph.
    """
    if asked.room is None:
        chosen = {part.file: scheme_for(part.graph.sites, asked.schemes) for part in parts}
    else:
        if len(parts) > 1 or asked.places is not None or asked.batched:
            what = "a budget is measured for one graph whose adapters do not change"
            raise PeftfxError(what, "budget", "say the bits by role, as in quantize='int4; int8@head'")
        part, text = parts[0], asked.calibration
        ids, program, held = None if text is None else read_text(Path(text), source), programs[part.file], oracle(part)
        inputs = [str(value.name) for value in program.graph.inputs]
        feeds, _ = texts(inputs, adapted, part.seen, held.reference, held.cases, ids, Path(text or "").name)
        measured = share_out(asked.room, program, part.graph.sites, adapted, held.reference, feeds, candidates())
        chosen, report.budget = {part.file: measured[0]}, measured[1]
    report.add_quantized({name: quantize(programs[name], choose) for name, choose in chosen.items()})


def agreement_of(
    path: Path, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, source: str | Path, text: str | Path | None
) -> dict[str, Agreement]:
    """How far a quantised part agrees with the model on a text, by the part's name."""
    model = OnnxModel(path, mapped=True)
    ids = None if text is None else read_text(Path(text), source)
    view, reference = part.seen, oracle.reference
    if isinstance(part.view, WithPromptInputs):  # what may be put into it is left out of a call
        reference = named_in(part.graph, EagerReference(adapted, view))
    elif isinstance(part.view, WithRowAdapters):
        if text is not None:
            hint = "leave --calibration out, or export each adapter merged"
            raise PeftfxError("rows with adapters of their own are compared on no text", str(text), hint)
        view = None
    found = agreement(model, adapted, view, reference, oracle.cases, ids, Path(text or "").name)
    return {} if found is None else {part.stem: found}


def refuse_disagreement(report: _Told, limit: MaxError | None, text: str | Path | None, where: Path) -> None:
    """Refuse a quantised model that agrees less than was asked for.

    Raises:
        VerificationError: it does.
        PeftfxError: the model has no logits to tell it by.
    """
    if text is not None and not report.agreement:
        hint = "leave --calibration out: its error is measured at random inputs"
        raise PeftfxError("the model gives no logits to compare on a text", str(text), hint)
    if limit is None or limit.kind == "error":
        return
    if not report.agreement:
        hint = "bound the error over the largest magnitude: max_error=0.1"
        raise PeftfxError(f"the model gives no logits: it has no {limit.kind}", "max_error", hint)
    worst = next((a for a in report.agreement.values() if not a.within(limit)), None)
    if worst is not None:
        what = f"quantisation costs more than {limit.kind}={limit.value:g}: {worst}"
        raise VerificationError(what, str(where), "quantise to int8, or allow more (--max-error)")
