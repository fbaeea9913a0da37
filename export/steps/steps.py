"""The steps of one export, in their order: each takes the parts as the step before left them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from torch import nn

from peftfx.errors import PeftfxError, warn
from peftfx.export.coded.place import opset_for, place_codes
from peftfx.export.coded.rounded import FINITE
from peftfx.export.deployment.deployment import Deployment, InGraph, Inputs
from peftfx.export.deployment.image_size import capture_free
from peftfx.export.deployment.parts import GraphPart, is_forward
from peftfx.export.own_passes import behind, run_own
from peftfx.export.quantised import round_weights
from peftfx.export.reports import facts
from peftfx.export.reports.report import Report
from peftfx.export.slots.batched import Batched
from peftfx.export.stages import Stages
from peftfx.export.tensor_counts import Destination, count_row_tensors, count_tensors
from peftfx.export.translation.side_checks import checked
from peftfx.export.translation.to_onnx import to_onnx
from peftfx.export.verification.eager.reference import no_oracle
from peftfx.export.verification.float32_twin import in_bfloat16
from peftfx.export.verification.oracle import Oracle
from peftfx.export.verification.random_numbers import refuse_random
from peftfx.export.verification.sizes.limits import OneSidedError, Sizes
from peftfx.export.verification.sizes.search import examples_beyond
from peftfx.export.writing.finite import may_be_infinite
from peftfx.export.writing.weights import Written, save_together
from peftfx.export_options.export import ExportOptions
from peftfx.export_options.values import ANY_SIZE
from peftfx.graph.trace import refuse_transformed
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.adaptation.constants import freeze_solutions
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.base import Pass
from peftfx.passes.manager import PassManager
from peftfx.quantisation.coded import Coded, keeping

BFLOAT16 = (
    "bfloat16: ONNX Runtime's CPU provider has no kernels for it; serve this model on another (CUDA), or "
    "export a float32 base. It is verified here in float32, over the same weights"
)
Programs = Mapping[str, ir.Model]


def is_coded(base: nn.Module) -> bool:
    """Say whether a base has quantised weights that are kept as they are."""
    return any(isinstance(p, Coded) for p in base.parameters())


def tolerances(asked: ExportOptions) -> tuple[float | None, float | None]:
    """Return the absolute and the relative tolerance of outputs. None means that the tolerance is measured."""
    if not asked.rounds:
        return asked.atol, asked.rtol
    return 0.0, asked.bound.value if asked.bound is not None and asked.bound.kind == "error" else FINITE


@dataclass(frozen=True)
class ExportSteps:
    """What all steps of an export know.

    Attributes:
        adapted: the model, in eval mode.
        asked: the options.
        way: how the adapters are served.
        inputs: the user's example inputs, if there are any.
        example: the inputs that a verification starts from.
        report: what the steps tell.
        stages: the timer.
        source: the directory that the base was read from.
        passes: the user's own passes.
    """

    adapted: AdaptedModel
    asked: ExportOptions
    way: Deployment
    inputs: Inputs | None
    example: Inputs
    report: Report
    stages: Stages
    source: str | Path
    passes: Sequence[Pass]

    @functools.cached_property
    def coded(self) -> bool:
        return is_coded(self.adapted.base)

    @property
    def brief(self) -> bool:
        """Whether a large graph may be tried at sizes of 1 by the verification alone: it compares the export there."""
        plain = not (self.asked.allow_fixed or self.asked.rounds or self.passes)
        return plain and isinstance(self.way, InGraph) and not no_oracle(self.adapted)

    def captured(self) -> tuple[ExportSteps, list[GraphPart]]:
        """Capture the graphs, where that is right on both sides of the branches on sizes in the model's code.

        Code that pads a text to whole windows pads none of a text that is whole already. A capture of such a text is
        right for such texts alone, and one of another text is right for all. Return the graphs, and the steps with the
        example that was captured.

        Raises:
            PeftfxError: see `capture`.
        """
        try:
            return self, self.capture()
        except OneSidedError as refusal:
            if is_forward(self.adapted.base, self.asked.view, self.inputs):
                for example in examples_beyond(self.adapted, self.example, refusal.condition):
                    with suppress(PeftfxError):
                        steps = replace(self, inputs=example, example=example)
                        return steps, steps.capture()
            raise

    def capture(self) -> list[GraphPart]:
        """Capture the graphs, and find the sizes at which each is right.

        Raises:
            PeftfxError: the model cannot be captured, is right at some sizes alone, or draws random numbers.
        """
        with self.stages("capture"):
            if self.asked.images == ANY_SIZE:
                capture_free(self.adapted, self.example)
            captured = self.way.capture(self.adapted, self.asked.view, self.inputs)
            parts = [replace(part, sizes=self.sizes(part, brief=self.brief)) for part in captured]
        for part in parts:
            refuse_random(part.graph)
            made = (node.meta.get("val") for node in part.graph.nodes())
            refuse_transformed(made, type(self.adapted.base).__name__)
        return parts

    def sizes(self, part: GraphPart, *, brief: bool = False) -> Sizes:
        """Return the sizes at which a captured graph is right; a brief trial leaves sizes of 1 to the verification."""
        return self.way.sizes(self.adapted, part, self.example, self.asked.allow_fixed, brief=brief)

    def count(self, parts: Sequence[GraphPart]) -> None:
        """Count into the report where each tensor of the adapters goes."""
        acting = {name: self.adapted.adapter(name) for name in self.way.names(self.adapted)}
        graphs, report = [part.graph for part in parts], self.report
        if isinstance(self.way, Batched):
            report.tensors = count_row_tensors(acting, graphs)
        elif acting:
            report.tensors = count_tensors(acting, graphs, Destination.MERGED if self.way.merges else Destination.APART)
        if not_run := report.tensors.get(Destination.NOT_RUN):
            self.stages.progress(f"{not_run} tensors of the adapter are of modules that this view does not run")

    def merge(self, parts: Sequence[GraphPart]) -> list[GraphPart]:
        """Merge the active adapters into the weights; or solve the equations of those that stay, once for all calls."""
        if self.way.merges and self.adapted.active:
            with self.stages("merge"):
                merged = [PassManager([Merge()])(part.graph).graph for part in parts]
                facts.add_merged(self.report, merged)
                told = functools.partial(facts.add_rounding, self.report)
                return [
                    replace(part, exported=facts.tell_rounding(graph, told))
                    for part, graph in zip(parts, merged, strict=True)
                ]
        solved = [replace(part, exported=freeze_solutions(part.exported)) for part in parts]
        facts.add_merged(self.report, [part.exported for part in solved])
        return solved

    def rewrite(self, parts: list[GraphPart]) -> list[GraphPart]:
        """Run the user's own passes."""
        if self.passes:
            with self.stages("rewrite"):
                parts, self.report.passes = run_own(self.passes, parts)
        return parts

    def convert(
        self, parts: Sequence[GraphPart], *, told_bfloat16: bool
    ) -> tuple[list[GraphPart], dict[str, ir.Model]]:
        """Translate the graphs to ONNX. Return the parts in their final form, and their programs by file."""
        asked, report = self.asked, self.report
        with self.stages("convert"):
            made = [
                to_onnx(
                    checked(part.exported, part.sizes.sides),
                    opset=asked.opset or opset_for(part.exported),
                    engine=asked.engine,
                    optimize=asked.optimize,
                )
                for part in parts
            ]
            if not told_bfloat16 and any(map(in_bfloat16, made)):
                warn(f"some operations of this model's own code compute in {BFLOAT16}")
            finished = [self.way.finish(self.adapted, *pair) for pair in zip(parts, made, strict=True)]
            programs = {part.file: program for part, program in finished}
            codes = {part.stem: place_codes(program, part.exported) for part, program in finished}
            facts.add_codes(report, codes)
            for part, program in finished:
                prefix = "" if len(finished) == 1 else f"{part.stem}: "
                told = [*part.sizes.told, *facts.computed_anew(part.seen, self.adapted.base)]
                facts.add_sizes(report, program, told, part.graph, prefix)
                facts.add_images(report, program, part.seen, prefix)
                facts.add_positions(program, part.seen, self.adapted.base)
        return [part for part, _ in finished], programs

    def round(self, parts: Sequence[GraphPart], programs: Programs, space: Path) -> None:
        """Round the weights, if that is asked for. Files that are needed meanwhile are in `space`."""
        if self.asked.rounds:
            with self.stages("round"), self.codes_in(space):
                round_weights(
                    *(self.asked, self.adapted, parts, programs, self.oracle, self.source, self.report, space),
                    merged=self.way.merges,
                )

    def write(self, programs: Programs, directory: Path, written: Written | None) -> None:
        """Write the models and their weights."""
        with self.stages("write"):
            save_together(programs, directory, written=written, infinite=may_be_infinite(self.adapted))

    def oracle(self, part: GraphPart) -> Oracle:
        """Return what a written graph is compared with, behind the user's own passes."""
        return behind(self.way.oracle(self.adapted, part, self.example), self.passes, part)

    def codes_in(self, space: Path) -> AbstractContextManager[object]:
        """Return what keeps the decoded weights of a quantised base in files meanwhile."""
        return keeping(space) if self.coded else nullcontext()
