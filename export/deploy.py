"""export_onnx: a model, adapted or not, becomes a directory that ONNX Runtime serves, checked before it appears."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from peftfx.adapted import AdaptedModel
from peftfx.api import bare
from peftfx.decode import Decode
from peftfx.errors import PeftfxError
from peftfx.export.atomic import publish
from peftfx.export.batched import capture_batched, each_alone, with_ids, write_names
from peftfx.export.exported_model import write_export_json
from peftfx.export.genai import write_genai_config
from peftfx.export.in_eval import in_eval
from peftfx.export.memory import refuse_memory
from peftfx.export.onnx import CPU, FAST, check_optimize, to_onnx
from peftfx.export.parts import Part, capture_parts
from peftfx.export.probes import probes, view_probes
from peftfx.export.quantize import FINITE, check_quantization
from peftfx.export.quantize import quantize as quantize_model
from peftfx.export.report import REPORT, Report
from peftfx.export.swappable import Slots, capture_opened, filled, open_initializers, write_manifest
from peftfx.export.verify import reference_of, verify
from peftfx.export.weights import Written, save_together
from peftfx.opened import Opened
from peftfx.passes import Merge, PassManager
from peftfx.peft_files import RULES
from peftfx.rowwise import IDS

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
    max_error: float | None = None,
    slots: Slots | str | None = None,
    batched: Sequence[str] = (),
    source: str | Path = "",
    force: bool = False,
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
    `peftfx.decode`; an encoder-decoder becomes `encoder_model.onnx` and `decoder_model.onnx` over one file of weights:
    see `peftfx.seq2seq`. The result is run in ONNX Runtime at sizes that the export never saw, against the graph and
    against the base module with its adapters in torch, and moved into place only if they agree.

    Args:
        model: an AdaptedModel with its active adapters, or any module.
        directory: where to; it appears when it is complete.
        merge: fold the adapters into the weights; otherwise they stay apart, as initializers under their own names.
        view: `forward`, `decode`, or `auto`: `decode` for a model that generates text.
        inputs: keyword arguments of a forward call, for a model that example inputs cannot be made for.
        opset: version of the ONNX operators; by default torch's choice.
        engine: `fast`, or `torch` for torch.onnx's own road; see `to_onnx`.
        optimize: `cpu`: attentions, rotary embeddings and norms as ONNX's own operators; or `none`; see `to_onnx`.
        quantize: `int8` or `int4`: weights of products in blocks of small integers; see `peftfx.export.quantize`.
        max_error: what a quantised model may differ by from the same model in floating point, over the largest
            magnitude of an output; by default that is measured and reported, and may be whatever it is.
        slots: for a base without adapters: where adapters can be put when the model runs, or at which linear sites
            alone, as a target; see `peftfx.export.swappable`.
        batched: names of adapters of the model among which each row of a batch chooses; see `peftfx.export.batched`.
        source: where the base was read from, for who puts them there.
        force: replace the directory if it exists.
        atol, rtol: what may differ: `atol + rtol * largest magnitude` of an output; by default 1e-4 each, and 2e-2
            for a base in half precision, whose own rounding is of that size.
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
    check_quantization(quantize, max_error)
    check_optimize(optimize)
    if batched and slots is not None:
        hint = "export two directories"
        raise PeftfxError("adapters that rows choose from, and slots for others", ", ".join(batched), hint)
    refuse_memory(adapted, max_memory)
    report = Report.of(adapted, batched or adapted.active)
    say = progress or (lambda line: None)
    if any(p.dtype == torch.bfloat16 for p in adapted.base.parameters()):
        say(_BFLOAT16)
    stages = _Stages(report.seconds, say)
    with publish(Path(directory), force) as temporary, in_eval(adapted):
        with stages("capture"):
            if batched:
                parts = capture_batched(adapted, view, inputs, batched)
            elif slots is not None:
                parts = capture_opened(adapted, view, inputs, Slots.of(slots))
            else:
                parts = capture_parts(adapted, view, inputs)
        if merge and adapted.active and not batched:
            with stages("merge"):
                for part in parts:
                    part.exported = PassManager([Merge()])(part.graph)
                    report.add_merged(part.exported)
        with stages("convert"):
            programs = {
                part.file: to_onnx(part.exported, opset=opset, engine=engine, optimize=optimize) for part in parts
            }
            for part in parts if slots is not None else ():
                part.slots = open_initializers(programs[part.file], part.slots, adapted.base, part.graph.sites)
            if quantize is not None:
                report.quantized = {name: quantize_model(program, quantize) for name, program in programs.items()}
        with stages("write"):
            save_together(programs, temporary, written=written)
        with stages("verify"):
            usual = _tolerance(adapted.base)
            if quantize is not None:
                atol, rtol = 0.0, FINITE if max_error is None else max_error
            for part in parts:
                with adapted.disable_adapter() if batched else nullcontext():
                    cases = _cases(adapted, part, example)
                reference = reference_of(part.graph)
                if batched:
                    cases, reference = with_ids(cases, len(batched)), each_alone(adapted, part, batched)
                found = verify(
                    *(temporary / part.file, reference, cases),
                    atol=usual if atol is None else atol,
                    rtol=usual if rtol is None else rtol,
                    graph=part.graph,
                    shown=None if part.view is None else part.view.shown,
                )
                report.describe(part.exported, programs[part.file], found, "" if len(parts) == 1 else f"{part.stem}.")
        for part in parts:
            shown = part.view.view if isinstance(part.view, Opened) else part.view
            if batched:
                write_names(temporary, batched)
            elif isinstance(shown, Decode):
                _, entry = adapted.within(shown)
                write_genai_config(temporary, adapted.base.config, shown, 0 if entry is None else entry.shape[0])
            elif shown is None:
                write_export_json(temporary, part.file, part.exported, adapted.base, example)
            if slots is not None:
                write_manifest(temporary, adapted.base, part, str(source), usual if rtol is None else rtol)
        report.measure(temporary)
        if assets is not None:
            assets(temporary)
        _write_configs(adapted.base, temporary)
        report.write(temporary)
    return report


def _cases(adapted: AdaptedModel, part: Part, example: Mapping[str, object]) -> list[dict[str, torch.Tensor]]:
    """Calls to verify a part at."""
    if part.view is not None:
        return filled(view_probes(adapted, part.view), part.slots)
    own = {IDS, *(slot.name for slot in part.slots)}
    return filled(probes(adapted, [s for s in part.graph.inputs if s.name not in own], example), part.slots)


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


def _tolerance(base: nn.Module) -> float:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in base.parameters())
    return 2e-2 if half else 1e-4


def copy_assets(source: Path, target: Path) -> None:
    """Copy what a server needs beside the weights: config, tokenizer and processor files, not weights or adapters."""
    for path in sorted(source.iterdir()):
        named = path.name.startswith((".", "adapter_", "README", REPORT, RULES)) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _ASSETS and not named:
            shutil.copyfile(path, target / path.name)


_ASSETS = frozenset({".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".tiktoken", ".vocab"})
