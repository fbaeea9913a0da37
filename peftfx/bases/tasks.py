"""The tasks of models, by the names of transformers' pipelines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftfx.errors import PeftfxError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Task:
    """A task: the transformers `Auto` classes that make models for it, and how such classes' names end."""

    auto: tuple[str, ...]
    suffixes: tuple[str, ...] = ()


_COMPOSED = "EncoderDecoderModel"  #: the end of the classes that put any encoder and any decoder together
#: Every task, by its pipeline's name. If two tasks share a suffix, the tables of the `Auto` classes decide.
TASKS: Mapping[str, Task] = {
    "text-generation": Task(("AutoModelForCausalLM",), ("ForCausalLM", "LMHeadModel")),
    "text2text-generation": Task(("AutoModelForSeq2SeqLM",), ("ForConditionalGeneration", _COMPOSED)),
    "text-classification": Task(("AutoModelForSequenceClassification",), ("ForSequenceClassification",)),
    "token-classification": Task(("AutoModelForTokenClassification",), ("ForTokenClassification",)),
    "question-answering": Task(("AutoModelForQuestionAnswering",), ("ForQuestionAnswering",)),
    "multiple-choice": Task(("AutoModelForMultipleChoice",), ("ForMultipleChoice",)),
    "fill-mask": Task(("AutoModelForMaskedLM",), ("ForMaskedLM",)),
    "image-classification": Task(("AutoModelForImageClassification",), ("ForImageClassification",)),
    "video-classification": Task(("AutoModelForVideoClassification",), ("ForVideoClassification",)),
    "image-segmentation": Task(
        ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"),
        ("ForSemanticSegmentation", "ForUniversalSegmentation"),
    ),
    "object-detection": Task(("AutoModelForObjectDetection",), ("ForObjectDetection",)),
    "depth-estimation": Task(("AutoModelForDepthEstimation",), ("ForDepthEstimation",)),
    "image-text-to-text": Task(("AutoModelForImageTextToText",), ("ForConditionalGeneration", _COMPOSED)),
    "automatic-speech-recognition": Task(
        ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
        ("ForConditionalGeneration", "ForCTC", "ForSpeechSeq2Seq", "ForSpeechToText", _COMPOSED),
    ),
    "audio-classification": Task(("AutoModelForAudioClassification",), ("ForAudioClassification",)),
    "feature-extraction": Task(("AutoModel",), ("Model", "Encoder", "WithProjection")),
    "sentence-similarity": Task(("AutoModelForTextEncoding", "AutoModel")),
    "text-to-image": Task(()),
}

#: Other names of these tasks, used by users and hubs.
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

#: The tasks by HF PEFT's `task_type`.
PEFT_TASKS: Mapping[str, str] = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

#: The ends of the paths of modules that HF PEFT always trains and saves for a task.
PEFT_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

CHOOSING = "multiple-choice"  #: the task in which a row has several texts
FEATURES, SENTENCES = "feature-extraction", "sentence-similarity"  #: the tasks of models without a head
HEARING = ("automatic-speech-recognition", "audio-classification")  #: the tasks whose input is sound
_LANGUAGE = ("text-generation", "text2text-generation")
_PRETRAINING = "ForPreTraining"  #: the end of the classes of models with the heads of their pretraining
_MULTIMODAL = ("image-text-to-text", "automatic-speech-recognition")


def resolve_task(task: str | None, *, peft_task_type: str | None = None, config: object = None) -> str:
    """Return the name of the task: the one asked for, else PEFT's `task_type`, else by `config.architectures`.

    PEFT calls a model that generates text CAUSAL_LM or SEQ_2_SEQ_LM, even if it reads images or speech. For such a
    model the architecture decides.

    Args:
        task: the task that is asked for.
        peft_task_type: the `task_type` of an adapter.
        config: the base's config, of transformers or as its file has it.
    """
    if task is not None:
        return check_task(task)
    read = _reader(config)
    own = next((t for name in read("architectures") or () if (t := task_of_class(name))), None)
    if peft_task_type is not None:
        if peft_task_type not in PEFT_TASKS:
            hint = nearest(peft_task_type, PEFT_TASKS) or f"PEFT's types are {', '.join(PEFT_TASKS)}"
            raise PeftfxError(f"unknown PEFT task type {peft_task_type!r}", "task_type", hint)
        found = PEFT_TASKS[peft_task_type]
        writes = own in _MULTIMODAL or (own in _LANGUAGE and not _has_class(found, read("model_type")))
        return own if own is not None and writes and found in _LANGUAGE else found
    if own is None:
        raise PeftfxError(
            "neither the adapter nor the model tells the task",
            "config.json: architectures",
            f"name the task: {', '.join(TASKS)}",
        )
    return own


def task_of_adapter(saved: Mapping[str, Any], config: object) -> str | None:
    """Return the task for which an adapter was trained, as its own config tells it, or None.

    A config without a `task_type` names the class of the model that was trained, as HF PEFT and peftfx write it. It
    counts where it is a class of transformers, and not one that the base's config names.

    Args:
        saved: the adapter's config.
        config: the base's config, of transformers or as its file has it.
    """
    if saved.get("task_type") is not None:
        return resolve_task(None, peft_task_type=str(saved["task_type"]), config=config)
    name = class_of_adapter(saved, config)
    return None if name is None else task_of_class(name)


def class_of_adapter(saved: Mapping[str, Any], config: object) -> str | None:
    """Return the class of transformers that an adapter's config names, if the base's config does not, or None."""
    made = saved.get("auto_mapping") or {}
    name, library = str(made.get("base_model_class")), str(made.get("parent_library"))
    if not library.startswith("transformers.") or name in (_reader(config)("architectures") or ()):
        return None
    return name


@functools.cache
def task_of_class(name: str) -> str | None:
    """Return the task of a transformers class, by the end of its name (`BertForTokenClassification`), or None.

    If the end does not tell, the tables of the `Auto` classes do; but not those of models without a head, which list
    classes of all kinds. They come before an end that says only that it is a model (`MarianMTModel`).
    """
    ends = {task: max([0, *(len(s) for s in t.suffixes if name.endswith(s))]) for task, t in TASKS.items()}
    longest = max(ends.values())
    tasks = [task for task, length in ends.items() if length == longest]
    told = tasks[0] if longest and len(tasks) == 1 else None
    if told not in (None, FEATURES):
        return told
    if longest == 0 or told == FEATURES:
        tasks = [task for task in TASKS if task not in (FEATURES, SENTENCES)]
    return next((task for task in reversed(tasks) if _makes(task, name)), told)


def task_of(model: nn.Module) -> str:
    """Return the task of a built model, by its class or a base class. A model without a head extracts features."""
    found = (task_of_class(kind.__name__) for kind in type(model).__mro__)
    return next((task for task in found if task), "feature-extraction")


def check_task(task: str) -> str:
    """Return the name of a task, given the name or an alias. An unknown task is refused."""
    if (name := ALIASES.get(task, task)) not in TASKS:
        hint = nearest(task, [*TASKS, *ALIASES]) or f"the tasks are {', '.join(TASKS)}"
        raise PeftfxError(f"unknown task {task!r}", "task", hint)
    return name


def _makes(task: str, name: str) -> bool:
    """Say whether one of the task's `Auto` classes makes models of this class."""
    import transformers

    made = (getattr(transformers, auto)._model_mapping._model_mapping.values() for auto in TASKS[task].auto)
    return any(name == v or (isinstance(v, tuple | list) and name in v) for values in made for v in values)


def _reader(config: object) -> Callable[[str], Any]:
    """Return what reads a config's entries by name: None where there is none."""
    return config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)


def _has_class(task: str, model_type: object) -> bool:
    """Say whether one of the task's `Auto` classes has a class for this type of model."""
    import transformers

    return any(model_type in getattr(transformers, auto)._model_mapping._model_mapping for auto in TASKS[task].auto)


def is_decoder_type(model_type: object) -> bool:
    """Say whether models of this type write texts, and fill none: classifiers of it read a text at its last token."""
    return _has_class("text-generation", model_type) and not _has_class("fill-mask", model_type)


def maker_of(config: PreTrainedConfig, task: str | None, directory: Path) -> type:
    """Return the class to build: the config's own if it does this task, otherwise the choice of the `Auto` classes.

    Without a task, the config's own class counts also where it does none of these tasks, as one of time series does;
    but not one for pretraining, from which people take the model without its head.

    Args:
        config: the base's config.
        task: the task, as a pipeline's name or an alias.
        directory: the base's directory, for errors.
    """
    import transformers

    named = config.architectures or ()
    able = [name for name in named if not name.endswith(_PRETRAINING)]
    if task is not None or any(map(task_of_class, named)):
        task = resolve_task(task, config=config)
        able = [name for name in named if task_of_class(name) == task]
    for name in able:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            if not isinstance(config, found.config_class or object):
                what = f"the class {name} is not of the model_type {config.model_type}"
                raise PeftfxError(what, str(directory / "config.json"), "download the file again")
            return found
    task = resolve_task(task, config=config)
    for auto in TASKS[task].auto:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            choice = mapping[type(config)]
            choice = choice[0] if isinstance(choice, tuple | list) else choice
            assert isinstance(choice, type)
            return choice
    hint = f"it does {', '.join(t for t in TASKS if _has_class(t, config.model_type)) or 'no known task'}"
    raise PeftfxError(f"this model does not do {task}", str(directory), hint)
