"""Labels: what transformers' pipeline for a model's task gives for texts and images, the likeliest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from peftfx.bases.tasks import HEARING, resolve_task
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.load import load
from peftfx.serving.made_for import task_of_directory
from peftfx.serving.pipelines import pipeline
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.segments import SEGMENTS, counted, write_mask

#: Tasks whose results are read as JSON.
_TOLD = (
    *("text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction"),
    *("text-generation", "text2text-generation", "image-classification", "object-detection", SEGMENTS),
)


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """A list of labels with their scores, or whatever else the pipeline gives, for each text and each image.

    Raises:
        PeftfxError: the model is for something else, or lacks a tokenizer or image processor.
    """
    served = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    task = task_of_directory(served.directory) if asked.task is None else resolve_task(asked.task)
    if task in HEARING:
        raise PeftfxError("this model takes sound, not texts and images", task, "pass --audio FILE.wav")
    if task not in _TOLD:
        raise PeftfxError(
            "the command line cannot show the outputs of this model", task, "call peftfx.runtime.pipeline"
        )
    if asked.output is not None and (task != SEGMENTS or len(asked.images) != 1):
        hint = "pass one --image to a model that segments images"
        raise PeftfxError("--output is a picture of the segments of one image", "--output", hint)
    found = pipeline(served, task)
    options = _options(found.task, asked.top)
    for item in (*asked.texts, *map(str, asked.images)):
        with understanding(item, f"the {found.task} pipeline does not take this", "see `__cause__`"):
            value = found(item, **options)
        if task == SEGMENTS:
            if asked.output is not None:
                numbers = dict(getattr(served.config, "label2id", None) or {})
                write_mask(asked.output, value, numbers)
            value = counted(value)
        yield Found(value)


def _options(task: str, top: int) -> dict[str, object]:
    """Of a pipeline's call: a text is cut to what the model takes, and tokens of one label are told together."""
    if task == "token-classification":
        return {"aggregation_strategy": "simple"}
    ranked = ("text-classification", "image-classification", "fill-mask")
    shown: dict[str, object] = {"top_k": top} if task in ranked else {}
    return {**shown, "truncation": True} if task == "text-classification" else shown
