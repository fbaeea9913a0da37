"""The command `merge`: fold an adapter into a base, and write transformers' own directory, one weight at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from peftfx.bases.dtypes import dtype_plan
from peftfx.bases.files.folder import read_base_config
from peftfx.bases.files.gguf import as_directory
from peftfx.bases.quantised import QUANTISED
from peftfx.bases.sentences.modules import ALL, SentenceModules
from peftfx.bases.tasks import FEATURES, task_of
from peftfx.errors import PeftfxError
from peftfx.export.assets import copy_assets, write_configs
from peftfx.export.checkpoint.contents import CheckpointContents, contents_of, plain_names, refuse_unlike
from peftfx.export.checkpoint.merge_check import check_merge
from peftfx.export.checkpoint.merged_copy import merged_copy
from peftfx.export.checkpoint.merged_report import MergedReport
from peftfx.export.checkpoint.requantised import Requantised
from peftfx.export.checkpoint.shards import write_shards
from peftfx.export.command import refuse_output
from peftfx.export.deployment.parts import views_of
from peftfx.export.directories import TORCH_DTYPES, load_directories
from peftfx.export.quantised import refuse_disagreement
from peftfx.export.reports.report import versions
from peftfx.export.rounding.calibrated import fit_weights
from peftfx.export.rounding.texts import compared_text, refuse_text, split_text
from peftfx.export.stages import OnStage, Stages
from peftfx.export.verification.agreement import agreement
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.finite import refuse_infinite_adapters
from peftfx.export.writing.weights import Written
from peftfx.export_options.checked import takes
from peftfx.export_options.merge import MergeChanges, MergeOptions
from peftfx.files import Snapshot
from peftfx.graph.lazy_weights import exact
from peftfx.model.adapted import AdaptedModel
from peftfx.options import AUTO, DECODE
from peftfx.quantisation.coded import Coded, keeping
from peftfx.rules.peft_files import rule_folders


@takes(MergeOptions)
def merge_directory(
    base: str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    progress: OnStage | None = None,
    written: Written | None = None,
    **changes: Unpack[MergeChanges],
) -> MergedReport:
    """Write a base with an adapter folded into its weights, as transformers' `save_pretrained` would write it.

    The directory gets the config, the tokenizer, and the weights in safetensors files of at most `max_shard_size`. The
    weights are computed one at a time, when they are written. Before the directory appears, it is loaded again and
    compared with the base on which the adapter is not merged.

    Args:
        base: a transformers model's directory, quantised or not, or a GGUF file.
        output: the directory to write. It appears only when it is complete.
        options: see `MergeOptions`. Options can be given by name as well.
        progress: called with a line when a stage begins.
        written: called with the bytes of weights written so far, and the total.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: bad input, or an adapter that cannot be folded into weights (such as a soft prompt).
        VerificationError: the written model computes something else. Either way no output is left.
    """
    asked = MergeOptions.of(options, changes)
    refuse_output(Path(base), output, list(asked.folders.values()), asked.force)
    report = MergedReport("")
    stages = Stages(report.seconds, report.memory, progress or (lambda line: None))
    with as_directory(Path(base)) as directory, publish(output, asked.force) as temporary:
        folders = [part for folder in asked.folders.values() for part in (folder, *rule_folders(folder))]
        inputs = Snapshot(directory, *folders)
        refuse_text(asked.calibration, directory, asked.schemes)
        with stages("load"):
            adapted = _load(directory, asked)
        with stages("write"):
            model, rounded = _write(directory, temporary, adapted, asked, report, written)
        sentences = SentenceModules.found([*reversed(asked.folders.values()), directory])
        if sentences is not None and task_of(model) == FEATURES:
            sentences.copy(temporary)
        leave = () if sentences is None else ALL
        for folder in asked.folders.values():
            copy_assets(folder, temporary, "config.json", *leave)
        copy_assets(directory, temporary, *leave)  # after the adapter's: an adapter's own tokenizer wins
        write_configs(model, temporary)
        inputs.check()
        with stages("verify"), keeping(temporary.parent):
            loaded, feeds = check_merge(temporary, adapted, model, report, asked, rounded)
            if rounded is not None:
                _agree(adapted, loaded, feeds, report, asked, temporary)
        report.versions = versions()
        report.measure(temporary)
        report.write(temporary)
    return report


def _load(base: Path, asked: MergeOptions) -> AdaptedModel:
    """Load the base and adapter in float32, whatever is stored. Weights are folded in float32, then rounded."""
    if "_class_name" in read_base_config(base):
        hint = "export it to ONNX, or merge it in Python: peftfx.load(model, adapter).merge()"
        raise PeftfxError("models of diffusers are not written", str(base), hint)
    adapted = load_directories(
        base,
        asked.folders,
        task=asked.task,
        dtype=torch.float32,
        quantize_base=asked.quantize_base,
        task_id=asked.task_id,
        idle=True,
    )
    refuse_infinite_adapters(adapted, adapted.names())  # a folded weight would not tell whose NaN it holds
    return adapted


def _write(
    base: Path,
    directory: Path,
    adapted: AdaptedModel,
    asked: MergeOptions,
    report: MergedReport,
    written: Written | None,
) -> tuple[nn.Module, Requantised | None]:
    """Write the merged model's weights. Return the model, and which of its layers were rounded."""
    merged, done = merged_copy(adapted)
    model: Any = merged
    refuse_unlike(adapted.base.state_dict(keep_vars=True), model.state_dict(keep_vars=True))
    wanted = TORCH_DTYPES[asked.dtype] if asked.dtype is not None else _own_dtype(base, adapted.base)
    model.config.dtype, model.config.architectures = wanted, [type(model).__name__]
    requantised = None
    if asked.quantize is not None:
        requantised = Requantised.of(model, adapted.sites, asked.schemes, wanted, plain_names(model))
        model.config.quantization_config = requantised.config()
        if any(scheme.gptq for scheme in asked.schemes):
            assert asked.calibration is not None
            ids, _ = split_text(text := Path(asked.calibration), base)
            made, report.gptq = fit_weights(
                adapted, ids, text.name, list(requantised.candidates(model)), directory.parent, merged=True
            )
            requantised.take(made)
    contents = contents_of(model, dtype_plan(model, wanted), {} if requantised is None else requantised.packings)
    report.model, report.dtype = type(model).__name__, str(wanted).removeprefix("torch.")
    report.methods = [type(rule).__name__ for name in adapted.active for rule in adapted.adapter(name).rules]
    report.add_merge(done)
    report.not_run = [path for path in report.merged if path in adapted.idle_layers]
    write_shards(contents.tensors, directory, asked.shard, written)
    rounded = {name.removesuffix(".weight"): r for name, r in contents.roundings.items() if name.endswith(".weight")}
    report.rounding = {path: asdict(rounded[path]) for path in report.merged if path in rounded}
    if requantised is not None:
        report.quantized, report.lost = requantised.schemes, requantised.lost
        report.left = {**requantised.left, **requantised.beside}
        _ignore(model, contents)
    return merged, requantised


def _ignore(model: Any, contents: CheckpointContents) -> None:
    """List further matrices in floating point in the config: those of stacks that the files hold matrix by matrix."""
    said, paths = model.config.quantization_config, {path for path, _ in model.named_modules()}
    if "ignore" in said:
        names = (
            n.removesuffix(".weight")
            for n, c in contents.tensors.items()
            if n.endswith(".weight") and len(c.shape) == 2
        )
        said["ignore"] = [*said["ignore"], *(name for name in names if name not in paths)]


def _own_dtype(base: Path, model: nn.Module) -> torch.dtype:
    """Return the dtype of a base: its config's, else its weights'; float32 if its weights are codes."""
    if any(isinstance(p, Coded) for p in model.parameters()):
        return torch.float32
    config = read_base_config(base)
    said = config.get("dtype", config.get("torch_dtype"))
    named = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
    if config.get(QUANTISED) is None and isinstance(said, str) and said in named:
        return named[said]
    return next((exact(p).dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@torch.no_grad()
def _agree(
    adapted: AdaptedModel,
    loaded: AdaptedModel,
    feeds: Sequence[dict[str, Tensor]],
    report: MergedReport,
    asked: MergeOptions,
    directory: Path,
) -> None:
    """Measure on a text how far the rounded model agrees with the base and its unmerged adapter.

    Raises:
        VerificationError: the models agree less than the options ask for.
    """
    text = asked.calibration
    ids = None if text is None else compared_text(Path(text), directory, asked.schemes)
    name = next(iter(views_of(adapted.base, AUTO, None).values()))
    view = adapted.view(DECODE) if name == DECODE else None
    want, got = (EagerReference(model, view, model.example) for model in (adapted, loaded))
    outputs = frozenset(d.output for d in report.differences)
    found = agreement(_Eager(got, frozenset(feeds[0]), outputs), adapted, view, want, feeds, ids, Path(text or "").name)
    report.agreement = {} if found is None else {"model": found}
    refuse_disagreement(report, asked.bound, text, directory)


@dataclass(frozen=True)
class _Eager:
    """A torch model that takes tensors by name and returns its outputs by name."""

    reference: EagerReference
    inputs: frozenset[str]
    outputs: frozenset[str]

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        return self.reference(tensors)
