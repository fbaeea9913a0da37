"""Load a base and its adapters from directories, as they are exported: with the task, dtype and head that they need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from peftfx.adapters.files.base.vocabulary import resize_vocabulary, tell_tokens_without_rows
from peftfx.bases.files.folder import read_base_config
from peftfx.bases.labels import name_labels
from peftfx.bases.load import load_base
from peftfx.bases.quantised import QUANTISED, quantise
from peftfx.bases.sentences.encoder import as_sentence_encoder
from peftfx.bases.sentences.modules import FILE, SentenceModules
from peftfx.bases.tasks import FEATURES, SENTENCES, class_of_adapter, resolve_task, task_of_adapter
from peftfx.errors import PeftfxError
from peftfx.export.deployment.parts import sites_view
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.options import FORWARD
from peftfx.rules.peft_files import CONFIG, Weights, modules_in, read_adapter_config, rule_folders
from peftfx.rules.tied_copies import method_of_file
from peftfx.rules.trained_copies import saved_modules
from peftfx.rules.unplaced import is_idle

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    idle: bool = False,
) -> AdaptedModel:
    """Load a base model with adapters on it by name, all from directories. The last adapter is active.

    With `quantize_base` the base is quantised after loading: see `peftfx.bases.quantised.quantise`. With `sentences`,
    and no other task, the model is a sentence encoder: see `peftfx.bases.sentences.encoder`.

    With `task_id`, an adapter that acts differently for each task keeps only the part for this task.

    If an adapter holds a head, the head sets the number of labels, whatever the config says. If it holds embeddings,
    they set the number of tokens.

    The model is captured in the exported `view` if that view has all sites; `sized` says that a size of images is
    chosen. `road` says how calls are run: see `peftfx.transform`. With `idle` adapters may act at layers that the
    example call does not run; otherwise such an adapter is refused.
    """
    config = read_base_config(base)
    if not adapters:
        task = sentence_task(task, None, sentences, base)
        model = load_base(base, task=task, dtype=dtype)
        if quantize_base is not None:
            quantise(model, quantize_base)
        return _bare(_with_steps(model, task, sentences), view, road, sized=sized)
    folders = [folder for adapter in adapters.values() for folder in rule_folders(adapter)]
    configs = {folder: read_adapter_config(folder) for folder in folders}
    methods = {folder: method_of_file(own, str(folder / CONFIG)) for folder, own in configs.items()}
    weights = {folder: Weights(folder, method.prefix) for folder, method in methods.items()}
    told = next(filter(None, (task_of_adapter(own, config) for own in configs.values())), None)
    task = sentence_task(task, told, sentences, base) or told
    classes = (class_of_adapter(own, config) for own in configs.values())
    named = next(filter(None, classes), None) if task is None else None  # a class that does none of the named tasks
    labels = None
    for folder in (folder for folder, method in methods.items() if method.modules_to_save):
        labels = labels or _labels(
            load_base(base, task=task, weights=False, named=named), weights[folder], methods[folder]
        )
    given = {name.replace(".base_layer.", ".") for own in weights.values() for name in own.names}
    beside = list(adapters.values())[::-1]
    model = load_base(base, task=task, num_labels=labels, given=given, dtype=dtype, beside=beside, named=named)
    name_labels(model, adapters.values())
    resize_vocabulary(model, weights.values())
    tell_tokens_without_rows(model, adapters.values())
    if quantize_base is not None:
        quantise(model, quantize_base)
    adapted = _bare(_with_steps(model, task, sentences), view, road, sized=sized)
    for name, adapter in adapters.items():
        if idle:
            adapted.widen_sites(path for path in modules_in(adapter) if is_idle(path, adapted.source, adapted.sites))
        adapted.load_adapter(adapter, name)
    if task_id is not None:
        _take_task(adapted, task_id)
    return adapted


def _bare(model: nn.Module, view: str, road: str | None, *, sized: bool) -> AdaptedModel:
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


def _labels(model: nn.Module, weights: Weights, method: object) -> int | None:
    """Return the number of labels of an adapter's head if it differs from the model's number; None otherwise."""
    own = getattr(getattr(model, "config", None), "num_labels", None)
    if own is None:
        return None
    for path in saved_modules(model, method):  # type: ignore[arg-type]
        for name, tensor in model.get_submodule(path).state_dict().items():
            shape = weights.shapes.get(f"{path}.{name}")
            if not shape or not tensor.ndim or shape[0] == len(tensor) or shape[1:] != tuple(tensor.shape[1:]):
                continue
            if (more := len(tensor) - own) in (0, 1):  # DETR and others have one more class, for no object
                return int(shape[0]) - more
    return None
