"""Export a model, adapted or not, as a directory that ONNX Runtime serves. It is verified before it appears."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from torch import nn

from peftfx.bases.peft_model import is_peft_model
from peftfx.bases.processors.pictures import pictures_of
from peftfx.errors import warn
from peftfx.export.assets import write_configs
from peftfx.export.coded.place import place_codes
from peftfx.export.coded.rounded import FINITE
from peftfx.export.deployment.deployment import Deployment, InGraph
from peftfx.export.deployment.image_size import capture_free, chosen_picture, example_of_size
from peftfx.export.deployment.merged_decoder import write_merged_decoder
from peftfx.export.deployment.parts import GraphPart, sites_view
from peftfx.export.deployment.serving_mode import in_eval
from peftfx.export.metadata import ADAPTERS_KEY, BASE_MODEL, FINGERPRINT
from peftfx.export.own_passes import behind, refuse_unfit, run_own, shown_of
from peftfx.export.quantised import agreement_of, refuse_disagreement, round_weights
from peftfx.export.reports import facts
from peftfx.export.reports.report import Report
from peftfx.export.rounding.texts import refuse_text
from peftfx.export.slots.batched import Batched
from peftfx.export.slots.swappable import Swappable
from peftfx.export.stages import OnStage, Stages
from peftfx.export.tensor_counts import Destination, count_row_tensors, count_tensors
from peftfx.export.translation.between_casts import is_narrow
from peftfx.export.translation.scopes import put_rest
from peftfx.export.translation.side_checks import checked
from peftfx.export.translation.to_onnx import to_onnx
from peftfx.export.verification.comparison import VerificationError, verify
from peftfx.export.verification.eager.reference import no_oracle
from peftfx.export.verification.float32_twin import in_bfloat16
from peftfx.export.verification.oracle import Oracle
from peftfx.export.verification.random_numbers import refuse_random
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.finite import may_be_infinite, refuse_infinite_adapters
from peftfx.export.writing.memory import refuse_memory
from peftfx.export.writing.weights import Written, save_together
from peftfx.export_options.checked import takes
from peftfx.export_options.export import ExportChanges, ExportOptions
from peftfx.export_options.values import ANY_SIZE
from peftfx.generation.invocation import INVOCATION_KEY
from peftfx.graph.contexts import TRACING, without_autocast
from peftfx.graph.fingerprint import SAMPLED, fingerprint
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare, load
from peftfx.options import DECODE, FORWARD
from peftfx.passes.adaptation.constants import freeze_solutions
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.base import Pass
from peftfx.passes.manager import PassManager
from peftfx.quantisation.coded import Coded, keeping

_BFLOAT16 = (
    "bfloat16: ONNX Runtime's CPU provider has no kernels for it; serve this model on another (CUDA), or "
    "export a float32 base. It is verified here in float32, over the same weights"
)


@takes(ExportOptions)
def export_onnx(
    model: nn.Module,
    directory: str | Path,
    options: ExportOptions | None = None,
    *,
    inputs: Mapping[str, object] | None = None,
    source: str | Path = "",
    assets: Callable[[Path], object] | None = None,
    progress: OnStage | None = None,
    written: Written | None = None,
    passes: Sequence[Pass] = (),
    **changes: Unpack[ExportChanges],
) -> Report:
    """Write `directory/model.onnx` (and `model.onnx.data`) for the model in eval mode.

    In the forward view, inputs and outputs have the names of the model's keyword arguments and output fields; batch
    size and sequence length are free. In the decode view, inputs and outputs have the names that generating runtimes
    know, with the key/value cache in and out: see `peftfx.views.decode`. An encoder-decoder becomes
    `encoder_model.onnx` and `decoder_model.onnx`, which share one file of weights: see `peftfx.views.encoder_decoder`.
    The result is run in ONNX Runtime at sizes that the export never saw, and compared with the graph and with the base
    module and its adapters in torch. The directory is moved into place only if they agree. One thread exports at a
    time; others wait. Autocast is off meanwhile.

    Args:
        model: an AdaptedModel with its active adapters, a `peft.PeftModel` with its own, or any module.
        directory: the directory to write. It appears only when it is complete.
        options: see `peftfx.ExportOptions`. Options can be given by name as well, for example `view="decode"`.
        inputs: keyword arguments of a forward call, needed if peftfx cannot make example inputs for the model.
        source: the directory that the base was read from. An export with slots records it, and its tokenizer reads a
            `calibration` text.
        assets: called with the new directory, to put files beside the model.
        progress: called with a line when a stage begins.
        written: called with the bytes of weights written so far, and the total.
        passes: run on the merged graphs before their translation to ONNX; see `peftfx.passes`. If a pass changes the
            outputs, the result is compared with the graph after the passes.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: an option makes no sense, the model cannot be captured or translated, or the directory cannot be
            written.
        VerificationError: ONNX Runtime and torch disagree; no output is left.

    Example:
        >>> report = peftfx.export_onnx(model, "onnx", view="forward")
        >>> served = peftfx.runtime.load("onnx")
        >>> served(input_ids=torch.tensor([[3, 5, 8]]), attention_mask=torch.ones(1, 3, dtype=torch.long)).logits.shape
        torch.Size([1, 3, 64])
    """
    asked = ExportOptions.of(options, changes)
    adapted = _adapted(model, inputs, asked).floating()
    picture = chosen_picture(adapted.base, asked.images, asked.view)
    if asked.images is not None and (picture is None or (inputs is not None and asked.view != DECODE)):
        inputs = example_of_size(adapted, asked.images, inputs, asked.view)
    example = adapted.example if inputs is None else inputs
    limit, (atol, rtol) = asked.bound, _bounds(asked)
    coded = any(isinstance(p, Coded) for p in adapted.base.parameters())
    way = _deployment(asked, str(source), merges=asked.merges(coded))
    refuse_unfit(passes, way)
    refuse_memory(adapted, asked.memory)
    refuse_text(asked.calibration, source, asked.schemes)
    refuse_infinite_adapters(adapted, way.names(adapted))
    report = Report.of(adapted, way.names(adapted))
    say = progress or (lambda line: None)
    told_bfloat16 = is_narrow(adapted.base)
    if told_bfloat16:
        (progress or warn)(_BFLOAT16)
    stages = Stages(report.seconds, report.memory, say)

    brief = isinstance(way, InGraph) and not (asked.allow_fixed or asked.rounds or passes or no_oracle(adapted))

    def oracle_of(part: GraphPart) -> Oracle:
        return behind(way.oracle(adapted, part, example), passes, part)

    with (
        TRACING,
        without_autocast(adapted.base),
        publish(Path(directory), asked.force) as temporary,
        in_eval(adapted),
        pictures_of(picture),
    ):
        with stages("capture"):
            if asked.images == ANY_SIZE:
                capture_free(adapted, example)
            parts = [
                replace(part, sizes=way.sizes(adapted, part, example, asked.allow_fixed, brief=brief))
                for part in way.capture(adapted, asked.view, inputs)
            ]
        for part in parts:
            refuse_random(part.graph)
        acting, graphs = {name: adapted.adapter(name) for name in way.names(adapted)}, [part.graph for part in parts]
        if isinstance(way, Batched):
            report.tensors = count_row_tensors(acting, graphs)
        elif acting:
            report.tensors = count_tensors(acting, graphs, Destination.MERGED if way.merges else Destination.APART)
        if not_run := report.tensors.get(Destination.NOT_RUN):
            say(f"{not_run} tensors of the adapter are of modules that this view does not run")
        if way.merges and adapted.active:
            with stages("merge"):
                merged = [PassManager([Merge()])(part.graph).graph for part in parts]
                facts.add_merged(report, merged)
                told = [facts.tell_rounding(graph, functools.partial(facts.add_rounding, report)) for graph in merged]
                parts = [replace(part, exported=graph) for part, graph in zip(parts, told, strict=True)]
        else:
            parts = [replace(part, exported=freeze_solutions(part.exported)) for part in parts]
            facts.add_merged(report, [part.exported for part in parts])
        if passes:
            with stages("rewrite"):
                parts, report.passes = run_own(passes, parts)
        with stages("convert"):
            programs = {
                part.file: to_onnx(
                    checked(part.exported, part.sizes.sides),
                    opset=asked.opset,
                    engine=asked.engine,
                    optimize=asked.optimize,
                )
                for part in parts
            }
            if not told_bfloat16 and any(map(in_bfloat16, programs.values())):
                warn(f"some operations of this model's own code compute in {_BFLOAT16}")
            finished = [way.finish(adapted, part, programs[part.file]) for part in parts]
            parts, programs = [part for part, _ in finished], {part.file: program for part, program in finished}
            facts.add_codes(report, {part.stem: place_codes(programs[part.file], part.exported) for part in parts})
            for part in parts:
                prefix = "" if len(parts) == 1 else f"{part.stem}: "
                facts.add_sizes(report, programs[part.file], part.sizes.told, part.graph, prefix)
                facts.add_images(report, programs[part.file], part.seen, prefix)
        if asked.rounds:
            with stages("round"), keeping(temporary.parent) if coded else nullcontext():
                round_weights(
                    *(asked, adapted, parts, programs, oracle_of, source),
                    *(report, temporary.parent),
                    merged=way.merges,
                )
        for program in programs.values():
            put_rest(program)
            program.metadata_props.update(_provenance(adapted, report, coded=coded))
        with stages("write"):
            save_together(programs, temporary, written=written, infinite=may_be_infinite(adapted))
        with stages("verify"), keeping(temporary.parent) if coded else nullcontext():
            idle: list[set[str]] = []
            verified = []
            for part in parts:
                oracle = oracle_of(part)
                try:
                    found = verify(
                        temporary / part.file,
                        oracle.reference,
                        oracle.cases,
                        measured=oracle.measured,
                        atol=atol,
                        rtol=rtol,
                        graph=part.graph,
                        shown=shown_of(part),
                    )
                except VerificationError:
                    if brief:  # the cause may be a branch on a size of 1, which the whole trial names
                        way.sizes(adapted, part, example, asked.allow_fixed)
                    raise
                verified.append(replace(part, found=found))
                if asked.rounds:
                    report.agreement |= agreement_of(temporary / part.file, adapted, part, oracle, source, asked)
                report.reference = oracle.told
                idle.append(oracle.idle)
                facts.add_graph(
                    report, part.exported, programs[part.file], found, "" if len(parts) == 1 else f"{part.stem}."
                )
            refuse_disagreement(report, limit, asked.calibration, Path(directory))
            report.idle = sorted(set.intersection(*idle))
        report.not_written = way.describe(temporary, adapted, verified, example)
        if asked.merged_decoder:
            with stages("merge the decoder"):
                write_merged_decoder(temporary)
        report.measure(temporary)
        if assets is not None:
            assets(temporary)
        write_configs(adapted.base, temporary)
        report.write(temporary)
    return report


def _adapted(model: nn.Module, inputs: Mapping[str, object] | None, asked: ExportOptions) -> AdaptedModel:
    if isinstance(model, AdaptedModel):
        return model
    if is_peft_model(model):
        return load(model, inputs=inputs)
    own = (
        sites_view(model, asked.view, sized=isinstance(asked.images, tuple))
        if inputs is None and isinstance(model, nn.Module)
        else FORWARD
    )
    return bare(model, inputs, view=own)


def _provenance(adapted: AdaptedModel, report: Report, *, coded: bool) -> dict[str, str]:
    """Return the metadata that says where a model comes from. Codes of quantised weights are not read for it."""
    adapters = "; ".join(f"{adapter['name']}: {'+'.join(adapter['methods'])}" for adapter in report.adapters)  # type: ignore[arg-type]
    said = {ADAPTERS_KEY: adapters, BASE_MODEL: report.model}
    said[INVOCATION_KEY] = "; ".join(" ".join(map(str, tokens)) for tokens in adapted.invocations)
    known = not coded and not any(p.is_meta for p in adapted.base.parameters())
    return {name: text for name, text in said.items() if text} | (
        {FINGERPRINT: fingerprint(adapted.base, SAMPLED)} if known else {}
    )


def _deployment(asked: ExportOptions, source: str, *, merges: bool) -> Deployment:
    if asked.places is not None:
        return Swappable(asked.places, source, *_bounds(asked))
    return Batched(tuple(asked.batched)) if asked.batched else InGraph(merges)


def _bounds(asked: ExportOptions) -> tuple[float | None, float | None]:
    """Return the absolute and the relative tolerance of outputs. None means that the tolerance is measured."""
    if not asked.rounds:
        return asked.atol, asked.rtol
    return 0.0, asked.bound.value if asked.bound is not None and asked.bound.kind == "error" else FINITE
