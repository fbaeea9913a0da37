"""Run transformers' pipeline for a model's task on texts and images, and show the likeliest labels first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

from peftfx.bases.tasks import FEATURES, HEARING
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.load import load
from peftfx.serving.made_for import task_of_directory
from peftfx.serving.pipelines import pipeline, sees_alone
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import WRITERS, refuse_idle
from peftfx.serving.runs.image_prompts import read_image
from peftfx.serving.runs.image_prompts import run as describe
from peftfx.serving.runs.prompts import continued
from peftfx.serving.runs.segments import SEGMENTS, counted, write_mask
from peftfx.serving.served import Served

#: The tasks whose results can be shown as JSON.
_TOLD = (
    *("text-classification", "token-classification", "fill-mask", "feature-extraction"),
    *("image-classification", "object-detection", SEGMENTS),
)
DESCRIBING, _ANSWERING = "image-text-to-text", "question-answering"
_RANKED = ("text-classification", "image-classification", "fill-mask")  #: tasks whose results are labels by score
_HIDDEN = "last_hidden_state"


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Yield labels with their scores, or the pipeline's other results, for each text and each image.

    A model that generates continues each text as a prompt. A model that writes texts about images describes the
    images, without a prompt.

    Raises:
        PeftfxError: the model is for another task, or lacks a tokenizer or image processor.
    """
    from transformers.pipelines.base import PipelineException

    served = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    task = task_of_directory(served.directory, asked.task)
    if task in HEARING:
        raise PeftfxError("this model takes sound, not texts and images", task, "pass --audio FILE.wav")
    if asked.output is not None and (task != SEGMENTS or len(asked.images) != 1):
        hint = "pass one --image to a model that segments images"
        raise PeftfxError("--output is only for the segments of one image", "--output", hint)
    if task == DESCRIBING and asked.images:
        if asked.texts:
            raise PeftfxError("a text that goes with images is a prompt", "--text", "pass --prompt in its place")
        yield from describe(replace(asked, prompt=""), out)
        return
    if task in WRITERS and asked.texts and not asked.images:
        for text in asked.texts:
            yield from continued(served, asked, text, out)
        return
    _refuse_unfit(asked, served, task)
    found = pipeline(served, task)
    options = _options(found.task, asked.most_labels)
    hint = "pass --verbose to see the cause" if asked.task is None else "leave --task out, or pass --verbose"
    for name, item in (*zip(asked.texts, asked.texts), *((str(path), read_image(path)) for path in asked.images)):
        with understanding(name, f"the {found.task} pipeline does not take this", hint, also=PipelineException):
            value = found(item, **options)
        if task == SEGMENTS:
            if asked.output is not None:
                numbers = dict(getattr(served.config, "label2id", None) or {})
                write_mask(asked.output, value, numbers)
            value = counted(value)
        yield Found(value)


def _refuse_unfit(asked: Asked, served: Served, task: str) -> None:
    """Refuse a task whose results cannot be shown, inputs of another kind than the model takes, and idle options."""
    if task == _ANSWERING:
        raise PeftfxError("this model answers a question by a text", task, "pass --query QUESTION with --text")
    if task not in _TOLD:
        raise PeftfxError(
            "the command line cannot show the outputs of this model", task, "in Python, call peftfx.runtime.load(DIR)"
        )
    sees = sees_alone(served, task)
    if asked.texts and sees:
        raise PeftfxError("this model takes images, not texts", task, "pass --image FILE")
    if asked.images and not sees:
        raise PeftfxError("this model takes texts, not images", task, "pass --text")
    if task == FEATURES and "logits" in served.model.outputs and _HIDDEN not in served.model.outputs:
        hint = f"leave --task out, or export the model with --task {FEATURES}"
        raise PeftfxError("this export gives logits, and no features", str(asked.directory), hint)
    refuse_idle(asked, f"does the task {task}", *(("top",) if task in _RANKED else ()))


def _options(task: str, top: int) -> dict[str, object]:
    """Return the options of a pipeline's call: cut texts to the model's length, and group tokens of a label."""
    if task == "token-classification":
        return {"aggregation_strategy": "simple"}
    shown: dict[str, object] = {"top_k": top} if task in _RANKED else {}
    return {**shown, "truncation": True} if task == "text-classification" else shown
