"""Tasks: what a model is for, by the names of transformers' pipelines, and the base models that are loaded for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftfx.errors import PeftfxError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Task:
    """A task: the transformers `Auto` classes that make models for it, and how such classes' names end."""

    auto: tuple[str, ...]
    suffixes: tuple[str, ...] = ()


#: Every task by its pipeline's name. A suffix that two tasks share is settled by the `Auto` classes' own tables.
TASKS: Mapping[str, Task] = {
    "text-generation": Task(("AutoModelForCausalLM",), ("ForCausalLM", "LMHeadModel")),
    "text2text-generation": Task(("AutoModelForSeq2SeqLM",), ("ForConditionalGeneration",)),
    "text-classification": Task(("AutoModelForSequenceClassification",), ("ForSequenceClassification",)),
    "token-classification": Task(("AutoModelForTokenClassification",), ("ForTokenClassification",)),
    "question-answering": Task(("AutoModelForQuestionAnswering",), ("ForQuestionAnswering",)),
    "fill-mask": Task(("AutoModelForMaskedLM",), ("ForMaskedLM",)),
    "image-classification": Task(("AutoModelForImageClassification",), ("ForImageClassification",)),
    "image-segmentation": Task(
        ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"),
        ("ForSemanticSegmentation", "ForUniversalSegmentation"),
    ),
    "object-detection": Task(("AutoModelForObjectDetection",), ("ForObjectDetection",)),
    "depth-estimation": Task(("AutoModelForDepthEstimation",), ("ForDepthEstimation",)),
    "image-text-to-text": Task(("AutoModelForImageTextToText",), ("ForConditionalGeneration",)),
    "automatic-speech-recognition": Task(
        ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"), ("ForConditionalGeneration", "ForCTC", "ForSpeechSeq2Seq")
    ),
    "audio-classification": Task(("AutoModelForAudioClassification",), ("ForAudioClassification",)),
    "feature-extraction": Task(("AutoModel",), ("Model", "Encoder")),
    "text-to-image": Task(()),
}

#: Other names that users and hubs have for these tasks.
ALIASES: Mapping[str, str] = {
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
    "image-to-text": "image-text-to-text",
    "visual-question-answering": "image-text-to-text",
    "semantic-segmentation": "image-segmentation",
    "image-feature-extraction": "feature-extraction",
    "zero-shot-image-classification": "feature-extraction",
}

#: HF PEFT's `task_type`s.
PEFT_TASKS: Mapping[str, str] = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

_LANGUAGE = ("text-generation", "text2text-generation")
_MULTIMODAL = ("image-text-to-text", "automatic-speech-recognition")
_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_task(task: str | None, *, peft_task_type: str | None = None, config: object = None) -> str:
    """The task's own name: the one asked for, else PEFT's `task_type`, else what `config.architectures` end in.

    PEFT calls what generates text CAUSAL_LM or SEQ_2_SEQ_LM even where it reads images or speech: there the
    architecture decides.
    """
    if task is not None:
        return _known(task)
    own = next((t for name in getattr(config, "architectures", None) or () if (t := task_of_class(name))), None)
    if peft_task_type is not None:
        if peft_task_type not in PEFT_TASKS:
            hint = nearest(peft_task_type, PEFT_TASKS) or f"PEFT has {', '.join(PEFT_TASKS)}"
            raise PeftfxError(f"unknown PEFT task type {peft_task_type!r}", "task_type", hint)
        found = PEFT_TASKS[peft_task_type]
        return own if own in _MULTIMODAL and found in _LANGUAGE else found
    if own is None:
        raise PeftfxError(
            "the task can be told neither from the adapter nor from the model",
            "config.json: architectures",
            f"name it: {', '.join(TASKS)}",
        )
    return own


def task_of_class(name: str) -> str | None:
    """The task of a transformers class, by the end of its name: `BertForTokenClassification`."""
    ends = {task: max((len(s) for s in t.suffixes if name.endswith(s)), default=0) for task, t in TASKS.items()}
    longest = max(ends.values())
    tasks = [task for task, length in ends.items() if length == longest]
    if longest == 0 or len(tasks) == 1:
        return tasks[0] if longest else None
    return next((task for task in reversed(tasks) if _makes(task, name)), None)


def task_of(model: nn.Module) -> str:
    """The task of a built model, by its class or one it derives from; a headless model extracts features."""
    found = (task_of_class(kind.__name__) for kind in type(model).__mro__ if kind is not nn.Module)
    return next((task for task in found if task), "feature-extraction")


def load_base(
    directory: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    weights: bool = True,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
) -> nn.Module:
    """A base model from a local directory in eval mode: transformers', or one of diffusers' (not a whole pipeline).

    Args:
        directory: has `config.json` and, in safetensors, the weights. Nothing is downloaded, unpickled or executed.
        task: makes the head; by default the class named in the config.
        num_labels: of a classification head, where the config does not say it.
        weights: read them; otherwise parameters stay uninitialised (buffers do not), for a capture alone.
        dtype: of the parameters; by default the config's.
        given: names of tensors that an adapter brings; these alone may be missing from the weights.

    Raises:
        PeftfxError: there is no such model here, its files are broken or lack a weight, or it cannot do the task.
    """
    directory = Path(directory)
    config = read_base_config(directory)
    if weights:
        _check_weights(directory)
    if "quantization_config" in config:
        method = dict(config["quantization_config"] or {}).get("quant_method", "unknown")  # type: ignore[call-overload]
        raise PeftfxError(f"the base model is quantised ({method})", str(directory), "use the unquantised model")
    try:
        if "_class_name" in config:
            return _load_diffusers(directory, str(config["_class_name"]), weights, dtype).eval()
        return _load_transformers(directory, config, task, num_labels, weights, dtype, given).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise PeftfxError(f"cannot load the base model: {first}", str(directory), "see `__cause__`") from error


def _known(task: str) -> str:
    if (name := ALIASES.get(task, task)) not in TASKS:
        hint = nearest(task, [*TASKS, *ALIASES]) or f"the tasks are {', '.join(TASKS)}"
        raise PeftfxError(f"unknown task {task!r}", "task", hint)
    return name


def _makes(task: str, name: str) -> bool:
    """Whether one of the task's `Auto` classes makes models of this class."""
    import transformers

    made = (getattr(transformers, auto)._model_mapping._model_mapping.values() for auto in TASKS[task].auto)
    return any(name == v or (isinstance(v, tuple | list) and name in v) for values in made for v in values)


def read_base_config(directory: Path) -> dict[str, object]:
    """The config of a local model directory, as JSON; a missing or broken one is a PeftfxError."""
    if not directory.is_dir():
        raise PeftfxError("there is no such directory", str(directory), "download the base model and pass its folder")
    path = directory / "config.json"
    if not path.is_file():
        parts = sorted(p.parent.name for p in directory.glob("*/config.json"))
        hint = f"a model is in {', '.join(parts)}: pass that folder" if parts else "pass the folder of a base model"
        raise PeftfxError("the directory has no config.json", str(directory), hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PeftfxError(f"not valid JSON: {error}", str(path), "download the file again") from error
    if not isinstance(config, dict):
        raise PeftfxError("not a JSON object", str(path), "download the file again")
    return config


def _check_weights(directory: Path) -> None:
    """Refuse missing, pickled, incomplete and truncated weights before any time is spent on them."""
    from safetensors import SafetensorError, safe_open

    files = [directory / name for name in _WEIGHTS if (directory / name).is_file()]
    for index in [] if files else directory.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise PeftfxError("not an index of safetensors files", str(index), "download the file again") from error
        files += [directory / name for name in sorted(shards)]
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        what = f"the weights are pickled ({', '.join(pickles)}) and pickle is never loaded" if pickles else "no weights"
        hint = "convert with `save_pretrained(..., safe_serialization=True)`" if pickles else f"expected {_WEIGHTS[0]}"
        raise PeftfxError(what, str(directory), hint)
    for file in files:
        if not file.is_file():
            raise PeftfxError("a file named in the index is missing", str(file), "download it")
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise PeftfxError(f"a broken safetensors file: {error}", str(file), "download it again") from error


def _load_transformers(
    directory: Path,
    raw: Mapping[str, object],
    task: str | None,
    num_labels: int | None,
    weights: bool,
    dtype: torch.dtype | None,
    given: Collection[str],
) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.initialization import no_init_weights

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        close = nearest(kind, CONFIG_MAPPING.keys()) if isinstance(kind, str) else ""
        hint = close or "a model with code of its own is not loaded: build it yourself and pass it"
        where = str(directory / "config.json")
        raise PeftfxError(f"transformers has no model type {kind!r}" if kind else "no `model_type`", where, hint)
    extra = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **extra)
    maker = _maker(config, resolve_task(task, config=config), directory)
    if weights:
        keep = {} if dtype is None else {"dtype": dtype}
        model, info = maker.from_pretrained(  # type: ignore[attr-defined]
            directory,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **keep,
        )
        assert isinstance(model, nn.Module)
        _refuse_random(model, info, given, directory)
        return model
    with no_init_weights():
        model = maker._from_config(config, dtype=dtype or config.dtype or torch.float32)  # type: ignore[attr-defined]
    assert isinstance(model, nn.Module)
    return model


def _refuse_random(model: nn.Module, info: Mapping[str, Any], given: Collection[str], directory: Path) -> None:
    """Refuse a model with weights that transformers made up because the files lack them, or have another shape."""
    other = {
        name: f"{name} ({list(have)} in the file, {list(want)} in the model)"
        for name, have, want in info["mismatched_keys"]
    }
    shown = {**{name: name for name in info["missing_keys"]}, **other}
    random = sorted(shown[name] for name in shown.keys() - set(given))
    if random:
        listed = ", ".join(random[:8]) + (f" and {len(random) - 8} more" if len(random) > 8 else "")
        hint = (
            f"name the task it was trained for, or give an adapter that holds them (this is a {type(model).__name__})"
        )
        raise PeftfxError(f"neither the base nor an adapter has the weights of {listed}", str(directory), hint)


def _maker(config: PreTrainedConfig, task: str, directory: Path) -> type:
    """The class to build: the one the config names if it does this task, else the `Auto` classes' choice."""
    import transformers

    named = [n for n in config.architectures or () if task_of_class(n) == task and hasattr(transformers, n)]
    if named:
        found = getattr(transformers, named[0])
        assert isinstance(found, type)
        return found
    for auto in TASKS[task].auto:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            choice = mapping[type(config)]
            choice = choice[0] if isinstance(choice, tuple | list) else choice
            assert isinstance(choice, type)
            return choice
    able = [t for t, v in TASKS.items() if any(type(config) in getattr(transformers, a)._model_mapping for a in v.auto)]
    raise PeftfxError(f"this model does not do {task}", str(directory), f"it does {', '.join(able) or 'no known task'}")


def _load_diffusers(directory: Path, name: str, weights: bool, dtype: torch.dtype | None) -> nn.Module:
    import diffusers
    from transformers.initialization import no_init_weights

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        hint = nearest(name, (n for n in dir(diffusers) if "Model" in n)) or "update diffusers"
        raise PeftfxError(f"diffusers has no model class {name!r}", str(directory / "config.json"), hint)
    if weights:
        keep = {} if dtype is None else {"torch_dtype": dtype}
        model = kind.from_pretrained(directory, local_files_only=True, use_safetensors=True, **keep)  # type: ignore[no-untyped-call]
    else:
        with no_init_weights():
            model = kind.from_config(kind.load_config(directory, local_files_only=True))  # type: ignore[no-untyped-call]
        model = model if dtype is None else model.to(dtype)
    assert isinstance(model, nn.Module)
    return model
