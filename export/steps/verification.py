"""The last step of an export: the written models are run, and compared with their oracles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from peftfx.bases.dtypes import is_half
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.own_passes import shown_of
from peftfx.export.quantised import agreement_of, warn_of_lost
from peftfx.export.reports import facts
from peftfx.export.rounding.before_rounding import hold_merged
from peftfx.export.rounding.held_codes import HeldGraph
from peftfx.export.steps.steps import ExportSteps, Programs, tolerances
from peftfx.export.translation.complex_pairs import pair_tensors
from peftfx.export.verification.comparison import Comparison, VerificationError, but_near_ties
from peftfx.export.verification.eager.kept_casts import refuse_lost_casts
from peftfx.export.verification.oracle import Oracle
from peftfx.export.verification.tolerances.rounded_numbers import with_rounded_numbers
from peftfx.export.verification.tolerances.sigmoids import made_by_sigmoids
from peftfx.export.verification.verify import verify
from peftfx.export.verification.without_rounding import (
    graph_of,
    hold_without_rounding,
    runs_exactly,
    runs_without_rounding,
)
from peftfx.export.writing.read_back import refuted


def verify_parts(
    steps: ExportSteps, parts: Sequence[GraphPart], programs: Programs, directory: Path
) -> list[GraphPart]:
    """Run the written models, and compare them with their oracles.

    Raises:
        VerificationError: ONNX Runtime and torch disagree.
    """
    report, verified, idle, unheld = steps.report, list[GraphPart](), list[set[str]](), ""
    with steps.stages("verify"), steps.codes_in(directory.parent):
        for part in parts:
            for wrong in refuted(directory / part.file, programs[part.file], pair_tensors(part.exported).get):
                raise VerificationError(wrong, str(directory / part.file), "report this model")
            oracle = steps.oracle(part)
            found = _compare(steps, part, oracle, directory)
            unheld += _hold_merged(steps, part, oracle, directory / part.file)
            verified.append(replace(part, found=found))
            if steps.asked.rounds:
                warn_of_lost(found, part.file)
                path = directory / part.file
                why = _held_graph(steps, part, path, programs[part.file], oracle, found).hold()
                unheld += f"; {part.file} is not held to its codes, as {why}" if why else ""
                report.agreement |= agreement_of(path, steps.adapted, part, oracle, steps.source, steps.asked)
            report.reference = f"{oracle.told}{unheld}"
            idle.append(oracle.idle)
            prefix = "" if len(parts) == 1 else f"{part.stem}."
            facts.add_graph(report, part.exported, programs[part.file], found, prefix)
        report.idle = sorted(set.intersection(*idle))
    return verified


def _compare(steps: ExportSteps, part: GraphPart, oracle: Oracle, directory: Path) -> list[Comparison]:
    """Compare a written model with its oracle.

    Raises:
        VerificationError: they disagree.
        PeftfxError: they disagree because a graph is right at some sizes alone, or because of the deployment.
    """
    atol, rtol = tolerances(steps.asked)
    measures = atol is None and rtol is None and not steps.passes and runs_without_rounding(steps.adapted.base)
    compare = functools.partial(
        verify,
        *(directory / part.file, oracle.reference, oracle.cases),
        measured=oracle.measured,
        atol=atol,
        rtol=rtol,
        graph=part.graph,
        shown=shown_of(part),
        empty=oracle.empty,
    )
    hold = functools.partial(_hold_without_rounding, steps, part, oracle, directory) if measures else None
    try:
        return but_near_ties(compare, part.graph, rounds=bool(steps.asked.rounds), without_rounding=hold)
    except VerificationError as error:
        if steps.brief:  # the cause may be a branch on a size of 1, which the whole trial names
            steps.sizes(part)
        if (cause := steps.way.cause(steps.adapted, part, oracle, steps.example)) is not None:
            raise cause from error
        raise


def _hold_merged(steps: ExportSteps, part: GraphPart, oracle: Oracle, path: Path) -> str:
    """Compare merged weights before they are rounded, where they are. Return what is told if that cannot be done.

    Raises:
        VerificationError: the merged graph computes something else.
    """
    if steps.passes or not (steps.way.merges and (steps.asked.rounds or is_half(steps.adapted.base))):
        return ""
    small = runs_exactly(steps.adapted.base)
    held = all(hold_merged(part.graph, part.exported, call, str(path), small=small) for call in oracle.held)
    return "" if held else f"; {part.file} is not compared before its merged weights are rounded"


def _held_graph(
    steps: ExportSteps, part: GraphPart, path: Path, program: ir.Model, oracle: Oracle, found: Sequence[Comparison]
) -> HeldGraph:
    """Return a rounded model with what it is held to."""
    small = runs_exactly(steps.adapted.base)
    captured = steps.way.captured(steps.adapted, part, oracle, steps.example)
    return HeldGraph(path, program, part.exported, captured, oracle.held, shown_of(part), found, small)


def _hold_without_rounding(
    steps: ExportSteps, part: GraphPart, oracle: Oracle, directory: Path, found: Sequence[Comparison]
) -> bool:
    """Compare a written model where nothing is rounded, and say whether that could be done.

    Raises:
        VerificationError: the graph, or ONNX Runtime with it, computes something else.
    """
    bare = steps.way.bare(steps.adapted, part, oracle, steps.example)
    if bare is not None:
        refuse_lost_casts(bare.code, bare.graph, oracle.largest, type(steps.adapted.base).__name__)
    hold = functools.partial(
        hold_without_rounding,
        *(directory / part.file, steps.way.captured(steps.adapted, part, oracle, steps.example)),
        graph_of(with_rounded_numbers(part.exported)),
        compared_as_is=found,
        shown=shown_of(part),
        sigmoids=made_by_sigmoids(part.exported),
    )
    return all(hold(call=call) for call in oracle.held)
