"""export_onnx: a model, adapted or not, becomes a directory that ONNX Runtime serves, checked before it appears."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from peftfx.errors import PeftfxError
from peftfx.export.deployment.deployment import Deployment, InGraph
from peftfx.export.deployment.serving_mode import in_eval
from peftfx.export.quantised import agreement_of, refuse_disagreement
from peftfx.export.report import Report
from peftfx.export.slots.batched import Batched
from peftfx.export.slots.swappable import Slots, Swappable
from peftfx.export.tensor_counts import NOT_RUN, count_tensors
from peftfx.export.translation.to_onnx import to_onnx
from peftfx.export.verification.agreement import MaxError, check_text
from peftfx.export.verification.comparison import verify
from peftfx.export.verification.tolerance import check_tolerance
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.finite import refuse_infinite_adapters
from peftfx.export.writing.memory import refuse_memory
from peftfx.export.writing.quantization import FINITE, check_quantization
from peftfx.export.writing.quantization import quantize as quantize_model
from peftfx.export.writing.weights import Written, save_together
from peftfx.graph.graph import BASE
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.options import CPU, FAST, check_engine, check_opset, check_optimize, check_view
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.manager import PassManager

Progress = Callable[[str], object]
_BFLOAT16 = (
    "bfloat16: ONNX Runtime's CPU provider has no kernels for it; serve this model on another (CUDA). "
    "It is verified here in float32, over the same weights"
)


def export_onnx(
    model: nn.Module,
    directory: str | Path,
    *,
    merge: bool = True,
    view: str = "forward",
    inputs: Mapping[str, object] | None = None,
    opset: int | None = None,
    engine: str = FAST,
    optimize: str = CPU,
    quantize: str | None = None,
    max_error: float | str | None = None,
    calibration: str | Path | None = None,
    slots: Slots | str | None = None,
    batched: Sequence[str] = (),
    source: str | Path = "",
    force: bool = False,
    allow_fixed: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    assets: Callable[[Path], object] | None = None,
    progress: Progress | None = None,
    written: Written | None = None,
    max_memory: int | None = None,
) -> Report:
    """Write `directory/model.onnx` (and `model.onnx.data`) for the model in eval mode.

    In the forward view, inputs and outputs have the names of the model's keyword arguments and output fields; batch and
    sequence are free. In the decode view they are those that runtimes which generate know, cache in and out: see
    `peftfx.views.decode`; an encoder-decoder becomes `encoder_model.onnx` and `decoder_model.onnx` over one file of
    weights: see `peftfx.views.encoder_decoder`. The result is run in ONNX Runtime at sizes that the export never saw,
    against the graph and against the base module with its adapters in torch, and moved into place only if they agree.

    Args:
        model: an AdaptedModel with its active adapters, or any module.
        directory: where to; it appears when it is complete.
        merge: fold the adapters into the weights; otherwise they stay apart, as initializers under their own names.
        view: `forward`, `decode`, or `auto`: `decode` for a model that generates text.
        inputs: keyword arguments of a forward call, for a model that example inputs cannot be made for.
        opset: version of the ONNX operators; by default torch's choice.
        engine: `fast`, or `torch` for torch.onnx's own road; see `to_onnx`.
        optimize: `cpu` or `cuda`: whole attentions, rotary embeddings and norms; or `none`; see `to_onnx`.
        quantize: `int8` or `int4`: weights of products in blocks of small integers; see
            `peftfx.export.writing.quantization`.
        max_error: what a quantised model may differ by from the same model in floating point: a number is over the
            largest magnitude of an output; `kl=0.05` bounds the mean divergence on a text in nats, and `top1=0.9` is
            the least share of tokens whose likeliest next one is the same. By default these are measured and
            reported, and may be whatever they are.
        calibration: a file of text that a quantised model is compared on, for a `source` with a tokenizer; by default
            the model's own greedy text.
        slots: for a base without adapters: where adapters can be put when the model runs, or at which layers alone,
            as a target; see `peftfx.export.slots.swappable`.
        batched: names of adapters of the model among which each row of a batch chooses; see
            `peftfx.export.slots.batched`.
        source: where the base was read from, for who puts them there.
        force: replace the directory if it exists.
        allow_fixed: export a model whose code branches on a size, though the export is right on the example's side
            alone; the report and the model's metadata say for which sizes that is.
        atol, rtol: what may differ: `atol + rtol * largest magnitude` of an output. By default it is measured: a
            multiple of what the model in torch is from itself in float64; see
            `peftfx.export.verification.tolerance`.
        assets: called with the new directory, to put files beside the model.
        progress: called with a line when a stage begins.
        written: called with the bytes of weights written so far, and those there will be.
        max_memory: bytes that may be allocated beyond the model itself; refused where fewer than `memory_needed`.

    Raises:
        PeftfxError: the model cannot be captured or translated, or the directory cannot be written.
        VerificationError: ONNX Runtime and torch disagree; nothing is left.
    """
    adapted = model if isinstance(model, AdaptedModel) else bare(model, inputs)
    example = adapted.example if inputs is None else inputs
    limit = MaxError.of(max_error)
    check_quantization(quantize, max_error, calibration)
    check_tolerance(atol, rtol)
    if calibration is not None:
        check_text(Path(calibration))
    check_optimize(optimize)
    check_opset(opset)
    check_engine(engine)
    check_view(view)
    if quantize is not None:
        atol, rtol = 0.0, limit.value if limit is not None and limit.kind == "error" else FINITE
    way = _deployment(merge, slots, batched, str(source), (atol, rtol))
    refuse_memory(adapted, max_memory)
    refuse_infinite_adapters(adapted, way.names(adapted))
    report = Report.of(adapted, way.names(adapted))
    say = progress or (lambda line: None)
    if any(p.dtype == torch.bfloat16 for p in adapted.base.parameters()):
        say(_BFLOAT16)
    stages = _Stages(report.seconds, say)
    with publish(Path(directory), force) as temporary, in_eval(adapted):
        with stages("capture"):
            parts = way.capture(adapted, view, inputs)
            for part in parts:
                part.sizes = way.sizes(adapted, part, example, allow_fixed)
        if isinstance(way, InGraph):
            acting = {name: adapted.adapter(name) for name in way.names(adapted)}
            report.tensors = count_tensors(acting, [part.graph for part in parts], merged=way.merges)
            if NOT_RUN in report.tensors:
                say(f"{report.tensors[NOT_RUN]} tensors of the adapter are of modules that this view does not run")
        if way.merges and adapted.active:
            with stages("merge"):
                for part in parts:
                    part.exported = PassManager([Merge()])(part.graph).graph
                    report.add_merged(part.exported)
        with stages("convert"):
            programs = {
                part.file: to_onnx(part.exported, opset=opset, engine=engine, optimize=optimize) for part in parts
            }
            programs = {part.file: way.finish(adapted, part, programs[part.file]) for part in parts}
            for part in parts:
                report.add_sizes(programs[part.file], part.sizes.limits, "" if len(parts) == 1 else f"{part.stem}: ")
            if quantize is not None:
                report.quantized = {name: quantize_model(program, quantize) for name, program in programs.items()}
        with stages("write"):
            infinite = [f"{BASE}.{name}" for name, _ in adapted.base.named_buffers(remove_duplicate=False)]
            save_together(programs, temporary, written=written, infinite=frozenset(infinite))
        with stages("verify"):
            idle: list[set[str]] = []
            for part in parts:
                oracle = way.oracle(adapted, part, example)
                found = verify(
                    temporary / part.file,
                    oracle.reference,
                    oracle.cases,
                    measured=oracle.measured,
                    atol=atol,
                    rtol=rtol,
                    graph=part.graph,
                    shown=None if part.view is None else part.view.shown,
                )
                part.found = found
                if quantize is not None:
                    report.agreement |= agreement_of(temporary / part.file, adapted, part, oracle, source, calibration)
                report.reference = oracle.told
                idle.append(oracle.idle)
                report.describe(part.exported, programs[part.file], found, "" if len(parts) == 1 else f"{part.stem}.")
            refuse_disagreement(report, limit, calibration, temporary)
            report.idle = sorted(set.intersection(*idle))
        way.describe(temporary, adapted, parts, example)
        report.measure(temporary)
        if assets is not None:
            assets(temporary)
        _write_configs(adapted.base, temporary)
        report.write(temporary)
    return report


def _deployment(
    merge: bool,
    slots: Slots | str | None,
    batched: Sequence[str],
    source: str,
    bounds: tuple[float | None, float | None],
) -> Deployment:
    twice = next((name for name in batched if list(batched).count(name) > 1), None)
    if twice is not None:
        raise PeftfxError("an adapter that rows choose is named twice", twice, "name each once")
    if slots is None:
        return Batched(tuple(batched)) if batched else InGraph(merge)
    if batched:
        hint = "export two directories"
        raise PeftfxError("adapters that rows choose from, and slots for others", ", ".join(batched), hint)
    return Swappable(Slots.of(slots), source, *bounds)


def _write_configs(base: nn.Module, directory: Path) -> None:
    """Write the config of the model as it is, with the labels of an adapter's head say, and how it generates."""
    write = getattr(getattr(base, "config", None), "to_json_file", None)
    if write is not None:
        write(directory / "config.json")
    generation = getattr(base, "generation_config", None)
    if generation is not None and base.can_generate():  # type: ignore[operator]
        generation.to_json_file(directory / "generation_config.json")


class _Stages:
    """Times the stages of an export, and says when each begins."""

    def __init__(self, seconds: dict[str, float], progress: Progress) -> None:
        self.seconds, self.progress = seconds, progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
