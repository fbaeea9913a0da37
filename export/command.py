"""The command `export`: read a base's directory and adapters' directories, and write an ONNX directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from peftfx.adapters.files.base_weights import resize_vocabulary
from peftfx.bases.gguf import as_directory
from peftfx.bases.labels import name_labels
from peftfx.bases.load import load_base, read_base_config
from peftfx.bases.processors.image_size import write_image_size
from peftfx.bases.quantised import QUANTISED, quantise
from peftfx.bases.sentences.encoder import as_sentence_encoder, embeds_sentences
from peftfx.bases.sentences.modules import ALL, FILE, SentenceModules, transformer_folder
from peftfx.bases.tasks import FEATURES, SENTENCES, resolve_task
from peftfx.errors import PeftfxError
from peftfx.export.assets import copy_assets
from peftfx.export.deployment.image_size import chosen_picture
from peftfx.export.deployment.parts import sites_view
from peftfx.export.onnx_directory import export_onnx
from peftfx.export.reports.report import Report
from peftfx.export.stages import OnStage
from peftfx.export.writing.atomic_directory import check_output
from peftfx.export.writing.weights import Written
from peftfx.export_options.checked import takes
from peftfx.export_options.directory import DirectoryChanges, DirectoryOptions
from peftfx.files import Snapshot, is_folder
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare, plan
from peftfx.model.plan import Plan, shapes_of
from peftfx.options import FORWARD
from peftfx.pages.page import Page
from peftfx.passes.base import Pass
from peftfx.pictures.adapted import show
from peftfx.rules.peft_files import CONFIG, Weights, read_adapter_config, rule_folders
from peftfx.rules.resolution import place, saved_modules
from peftfx.rules.tied_copies import method_of_file
from peftfx.sites.sites import Sites

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@takes(DirectoryOptions)
def export_directory(
    base: str | Path,
    output: str | Path,
    options: DirectoryOptions | None = None,
    *,
    progress: OnStage | None = None,
    written: Written | None = None,
    passes: Sequence[Pass] = (),
    **changes: Unpack[DirectoryChanges],
) -> Report:
    """Export a base model's directory, with or without HF PEFT adapters, to a directory for ONNX Runtime.

    Args:
        base: the base model's directory, or a GGUF file. The inputs are read in place; if a file changes during the
            export, this is an error.
        output: the directory to write. It appears only when it is complete.
        options: see `DirectoryOptions`. Options can be given by name as well, for example `view="decode"`.
        progress: called with a line when a stage begins.
        written: called with the bytes of weights written so far, and the total.
        passes: run on the merged graphs before their translation to ONNX, as in `export_onnx`.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: bad input; VerificationError: ONNX Runtime and torch disagree. Either way no output is left.
    """
    asked = DirectoryOptions.of(options, changes)
    refuse_output(Path(base), output, list(asked.folders.values()), asked.force)
    with as_directory(Path(base)) as directory:
        return _export(directory, output, asked, progress, written, passes)


def _export(
    base: Path,
    output: str | Path,
    asked: DirectoryOptions,
    progress: OnStage | None,
    written: Written | None,
    passes: Sequence[Pass],
) -> Report:
    folders = asked.folders
    say = progress or (lambda line: None)
    inputs = Snapshot(base, *(part for folder in folders.values() for part in (folder, *rule_folders(folder))))
    sentences = SentenceModules.found([*reversed(folders.values()), base])
    home = transformer_folder(base)
    kept = served_dtype(home, asked.dtype, asked.quantize_base)
    say("load" if kept is None else f"load in {str(kept).removeprefix('torch.')}")
    adapted = load_directories(
        home,
        folders,
        task=asked.task,
        dtype=kept,
        quantize_base=asked.quantize_base,
        sentences=sentences,
        task_id=asked.task_id,
        view=asked.view,
        sized=isinstance(asked.images, tuple),
        road="graph",  # no call runs the adapted modules here
    )
    for name in asked.batched:
        if adapted.tasks_of(name):
            adapted.split_tasks(name)
            adapted.remove(name)
    if asked.batched:
        asked = replace(asked, batched=dict.fromkeys(adapted.names(), ""))

    def assets(directory: Path) -> None:
        if sentences is not None and embeds_sentences(adapted.base):
            sentences.copy(directory)
        leave = () if sentences is None else ALL
        links = [
            link for own in reversed(folders.values()) for link in copy_assets(own, directory, "config.json", *leave)
        ]
        links += copy_assets(home, directory, *leave)  # after the adapters': an adapter's own tokenizer wins
        if links:
            say(f"not copied, links that leave their directory: {', '.join(map(str, links))}")
        if isinstance(asked.images, tuple) and not chosen_picture(adapted.base, asked.images, asked.view):
            write_image_size(directory, asked.images)
        inputs.check()

    return export_onnx(
        *(adapted, output, asked),
        source=home.resolve(),
        assets=assets,
        progress=progress,
        written=written,
        passes=passes,
    )


def served_dtype(base: Path, wanted: str | None, quantize_base: str | None) -> torch.dtype | None:
    """Return the dtype to load the base in. None means the dtype that the base is stored in.

    Raises:
        PeftfxError: the base is quantised, and a dtype other than fp32 is wanted.
    """
    config = read_base_config(base)
    if config.get(QUANTISED) is not None or quantize_base is not None:
        if wanted not in (None, "fp32"):
            what = f"the operators for a quantised base's codes compute in fp32, not in {wanted}"
            raise PeftfxError(what, str(base), "leave --dtype out")
        return torch.float32
    if wanted is None:
        own = config.get("dtype", config.get("torch_dtype"))
        return torch.float32 if own == "bfloat16" else None
    return TORCH_DTYPES[wanted]


def load_directories(
    base: Path,
    adapters: Mapping[str, Path],
    *,
    task: str | None = None,
    dtype: torch.dtype | None = None,
    quantize_base: str | None = None,
    sentences: SentenceModules | None = None,
    task_id: int | None = None,
    view: str = FORWARD,
    sized: bool = False,
    road: str | None = None,
) -> AdaptedModel:
    """Load a base model with adapters on it by name, all from directories. The last adapter is active.

    With `quantize_base` the base is quantised after loading: see `peftfx.bases.quantised.quantise`. With `sentences`,
    and no other task, the model is a sentence encoder: see `peftfx.bases.sentences.encoder`.

    With `task_id`, an adapter that acts differently for each task keeps only the part for this task.

    If an adapter holds a head, the head sets the number of labels, whatever the config says. If it holds embeddings,
    they set the number of tokens.

    The model is captured in the exported `view` if that view has all sites; `sized` says that a size of images is
    chosen. `road` says how calls are run: see `peftfx.transform`.
    """
    config = read_base_config(base)
    if not adapters:
        task = sentence_task(task, None, sentences, base)
        model = load_base(base, task=task, dtype=dtype)
        if quantize_base is not None:
            quantise(model, quantize_base)
        return _bare(_with_steps(model, task, sentences), view, road)
    folders = [folder for adapter in adapters.values() for folder in rule_folders(adapter)]
    configs = {folder: read_adapter_config(folder) for folder in folders}
    methods = {folder: method_of_file(own, str(folder / CONFIG)) for folder, own in configs.items()}
    weights = {folder: Weights(folder, method.prefix) for folder, method in methods.items()}
    kinds = [own["task_type"] for own in configs.values() if own.get("task_type") is not None]
    told = resolve_task(None, peft_task_type=str(kinds[0]), config=config) if kinds else None
    task = sentence_task(task, told, sentences, base) or told
    labels = None
    for folder in (folder for folder, method in methods.items() if method.modules_to_save):
        labels = labels or _labels(load_base(base, task=task, weights=False), weights[folder], methods[folder])
    given = {name.replace(".base_layer.", ".") for own in weights.values() for name in own.names}
    model = load_base(base, task=task, num_labels=labels, given=given, dtype=dtype)
    name_labels(model, adapters.values())
    resize_vocabulary(model, weights.values())
    if quantize_base is not None:
        quantise(model, quantize_base)
    adapted = _bare(_with_steps(model, task, sentences), view, road, sized=sized)
    for name, adapter in adapters.items():
        adapted.load_adapter(adapter, name)
    if task_id is not None:
        _take_task(adapted, task_id)
    return adapted


def _bare(model: nn.Module, view: str, road: str | None, *, sized: bool = False) -> AdaptedModel:
    return bare(model, road=road, view=sites_view(model, view, sized=sized))


def _take_task(adapted: AdaptedModel, task_id: int) -> None:
    """Reduce each adapter that has several tasks to the adapter of one task."""
    several = [name for name in adapted.names() if adapted.tasks_of(name)]
    if not several:
        what = "no adapter acts by task: each does the same for every one"
        raise PeftfxError(what, f"task_id {task_id}", "leave --task-id out")
    for name in several:
        adapted.take_task(name, task_id)


def sentence_task(asked: str | None, told: str | None, sentences: SentenceModules | None, base: Path) -> str | None:
    """Return the task to load a base for: the one `asked` for, or sentences if nothing asks for another task.

    Raises:
        PeftfxError: the sentence task is asked for, and no file says how sentences are embedded.
    """
    if asked is not None and resolve_task(asked) == SENTENCES and sentences is None:
        what = f"there is no {FILE}, which says how tokens become a sentence's embedding"
        raise PeftfxError(what, str(base), "save it with sentence-transformers, or use --task feature-extraction")
    return SENTENCES if asked is None and told in (None, FEATURES) and sentences is not None else asked


def _with_steps(model: nn.Module, task: str | None, sentences: SentenceModules | None) -> nn.Module:
    wanted = sentences is not None and task is not None and resolve_task(task) == SENTENCES
    return as_sentence_encoder(model, sentences.build()) if wanted and sentences is not None else model


def inspect_directory(directory: str | Path, *, task: str | None = None, target: str | None = None) -> Sites:
    """Return the sites of a model in a directory, or those that `target` picks. The weights are not read."""
    sites = bare(load_base(Path(directory), task=task, weights=False)).sites
    return sites if target is None else Sites(tuple(match.site for match in sites.select(target)))


def page_directory(
    directory: str | Path, *, rules: str | None = None, adapters: Sequence[Path] = (), task: str | None = None
) -> Page:
    """Show a model in a directory as a page, with `rules` or with `adapters`. Weights are read only for adapters."""
    if not adapters:
        adapted = bare(load_base(Path(directory), task=task, weights=False))
        made = {} if rules is None else {"": shapes_of(adapted.source, place(adapted.source, adapted.sites, rules))}
        return show(adapted.base, adapted.sites, made, values=False)
    adapted = bare(load_base(Path(directory), task=task))
    for path in adapters:
        adapted.load_adapter(path, path.name.replace(".", "_") or "adapter")
    return adapted.show()


def plan_directory(directory: str | Path, rules: str, *, task: str | None = None) -> Plan:
    """Return what `rules` would do to a model in a directory. The weights are not read."""
    return plan(load_base(Path(directory), task=task, weights=False), rules)


def _labels(model: nn.Module, weights: Weights, method: object) -> int | None:
    """Return the number of labels of an adapter's head if it differs from the model's number; None otherwise."""
    own = getattr(getattr(model, "config", None), "num_labels", None)
    for path in saved_modules(model, method):  # type: ignore[arg-type]
        for name, tensor in model.get_submodule(path).state_dict().items():
            shape = weights.shapes.get(f"{path}.{name}")
            if shape and tensor.shape[:1] == (own,) and shape[1:] == tuple(tensor.shape[1:]) and shape[0] != own:
                return int(shape[0])
    return None


def refuse_output(base: Path, output: str | Path, adapters: Sequence[Path], force: bool) -> None:
    """Refuse at once an output that would otherwise be refused after minutes of work."""
    target = Path(output).resolve()
    inputs = [base.resolve(), *(adapter.resolve() for adapter in adapters)]
    if any(target == i or target in i.parents for i in inputs):
        raise PeftfxError("the output would replace an input", str(output), "choose another output directory")
    check_output(output, force)
    free = shutil.disk_usage(next(p for p in (target, *target.parents) if os.path.exists(p))).free
    needed = sum(p.stat().st_size for p in base.glob("*.safetensors")) if is_folder(base) else 0
    if needed > free:
        raise PeftfxError(
            f"{free:,} bytes are free, {needed:,} are needed", str(output), "free space, or choose another disk"
        )
