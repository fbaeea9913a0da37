"""Export a model, adapted or not, as a directory that ONNX Runtime serves. It is verified before it appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from torch import nn

from peftfx.bases.peft_models.plain import is_peft_model
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.processors.videos import with_videos
from peftfx.errors import PeftfxError, warn
from peftfx.export.assets import copy_assets, tell_links, write_configs
from peftfx.export.deployment.deployment import Deployment, InGraph
from peftfx.export.deployment.image_size import chosen_picture, example_of_size
from peftfx.export.deployment.left_out import warn_of_left_out
from peftfx.export.deployment.merged_decoder import refuse_no_decoder, write_merged_decoder
from peftfx.export.deployment.parts import sites_view
from peftfx.export.deployment.serving_mode import in_eval
from peftfx.export.metadata import ADAPTERS_KEY, BASE_MODEL, FINGERPRINT
from peftfx.export.own_passes import refuse_unfit
from peftfx.export.quantised import refuse_disagreement
from peftfx.export.reports.report import Report
from peftfx.export.rounding.texts import refuse_text
from peftfx.export.slots.batched import Batched
from peftfx.export.slots.swappable import Swappable
from peftfx.export.stages import OnStage, Stages
from peftfx.export.steps.steps import BFLOAT16, ExportSteps, is_coded, tolerances
from peftfx.export.steps.verification import verify_parts
from peftfx.export.translation.between_casts import is_narrow
from peftfx.export.translation.scopes import put_rest
from peftfx.export.writing.atomic_directory import check_output, publish
from peftfx.export.writing.finite import refuse_infinite_adapters
from peftfx.export.writing.memory import refuse_memory
from peftfx.export.writing.weights import Written
from peftfx.export_options.checked import takes
from peftfx.export_options.export import ExportChanges, ExportOptions
from peftfx.files import is_folder
from peftfx.generation.invocation import INVOCATION_KEY
from peftfx.graph.capturing.trace_lock import TRACING
from peftfx.graph.contexts import without_autocast
from peftfx.graph.fingerprint import SAMPLED, fingerprint
from peftfx.memory.garbage import rarely_collected
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare, load
from peftfx.options import DECODE, FORWARD
from peftfx.passes.base import Pass


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
        source: the directory that the base was read from. Its tokenizer and processor files are copied, its tokenizer
            reads a `calibration` text, and an export with slots records it.
        assets: called with the new directory, to put files beside the model, in place of those of `source`.
        progress: called with a line when a stage begins.
        written: called with the bytes of weights written so far, and the total.
        passes: run on the merged graphs before their translation to ONNX; see `peftfx.passes`. If a pass changes the
            outputs, the result is compared with the graph after the passes.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: an option makes no sense, the model cannot be captured or translated, or the directory cannot be
            written.
        VerificationError: ONNX Runtime and torch disagree; no output is left.

    Examples:
        >>> report = peftfx.export_onnx(model, "onnx", view="forward")
        >>> served = peftfx.runtime.load("onnx")
        >>> served(input_ids=torch.tensor([[3, 5, 8]]), attention_mask=torch.ones(1, 3, dtype=torch.long)).logits.shape
        torch.Size([1, 3, 64])
    """
    asked = ExportOptions.of(options, changes)
    if source and not is_folder(Path(source)):
        raise PeftfxError(
            "there is no such directory", f"source: {source}", "give the folder of the base, or leave it out"
        )
    check_output(directory, asked.force)  # at once: a capture takes longer
    adapted = _adapted(model, inputs, asked).floating()
    picture = chosen_picture(adapted.base, asked.images, asked.view)
    if asked.images is not None and (picture is None or (inputs is not None and asked.view != DECODE)):
        inputs = example_of_size(adapted, asked.images, inputs, asked.view)
    example = adapted.example if inputs is None else inputs
    way = _deployment(asked, str(source), merges=asked.merges(is_coded(adapted.base)))
    refuse_unfit(passes, way)
    refuse_memory(adapted, asked.memory)
    refuse_text(asked.calibration, source, asked.schemes)
    refuse_infinite_adapters(adapted, way.names(adapted))
    report = Report.of(adapted, way.names(adapted))
    told_bfloat16 = is_narrow(adapted.base)
    if told_bfloat16:
        (progress or warn)(BFLOAT16)
    work = ExportSteps(
        *(adapted, asked, way, inputs, example, report),
        stages=Stages(report.seconds, report.memory, progress or (lambda line: None)),
        source=source,
        passes=passes,
    )
    with (
        TRACING,
        rarely_collected(),
        without_autocast(adapted.base),
        publish(Path(directory), asked.force) as temporary,
        in_eval(adapted),
        pictures_of(picture),
        with_videos(asked.videos),
    ):
        work, parts = work.captured()
        if asked.merged_decoder:
            refuse_no_decoder([part.file for part in parts])
        if inputs is None:
            warn_of_left_out(adapted.base, parts)
        work.count(parts)
        parts = work.rewrite(work.merge(parts))
        parts, programs = work.convert(parts, told_bfloat16=told_bfloat16)
        work.round(parts, programs, temporary.parent)
        for program in programs.values():
            put_rest(program)
            program.metadata_props.update(_provenance(adapted, report, coded=work.coded))
        work.write(programs, temporary, written)
        verified = verify_parts(work, parts, programs, temporary)
        refuse_disagreement(report, asked.bound, asked.calibration, Path(directory))
        report.not_written = way.describe(temporary, adapted, verified, example)
        if asked.merged_decoder:
            with work.stages("merge the decoder"):
                write_merged_decoder(temporary)
        report.measure(temporary)
        if assets is not None:
            assets(temporary)
        elif source:
            tell_links(copy_assets(Path(source), temporary), progress or warn)
        write_configs(adapted.base, temporary)
        report.write(temporary)
    return report


def _adapted(model: nn.Module, inputs: Mapping[str, object] | None, asked: ExportOptions) -> AdaptedModel:
    if isinstance(model, AdaptedModel):
        return model
    if is_peft_model(model):
        return load(model, inputs=inputs, road="graph")
    own = (
        sites_view(model, asked.view, sized=isinstance(asked.images, tuple))
        if inputs is None and isinstance(model, nn.Module)
        else FORWARD
    )
    return bare(model, inputs, "graph", own)


def _provenance(adapted: AdaptedModel, report: Report, *, coded: bool) -> dict[str, str]:
    """Return the metadata that says where a model comes from. Codes of quantised weights are not read for it."""
    adapters = "; ".join(f"{adapter['name']}: {'+'.join(adapter['methods'])}" for adapter in report.adapters)
    said = {ADAPTERS_KEY: adapters, BASE_MODEL: report.model}
    said[INVOCATION_KEY] = "; ".join(" ".join(map(str, tokens)) for tokens in adapted.invocations)
    known = not coded and not any(p.is_meta for p in adapted.base.parameters())
    return {name: text for name, text in said.items() if text} | (
        {FINGERPRINT: fingerprint(adapted.base, SAMPLED)} if known else {}
    )


def _deployment(asked: ExportOptions, source: str, *, merges: bool) -> Deployment:
    if asked.places is not None:
        return Swappable(asked.places, source, *tolerances(asked), asked.rounds, asked.images)
    return Batched(tuple(asked.batched)) if asked.batched else InGraph(merges)
