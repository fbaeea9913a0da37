"""transformers' own pipelines over an exported directory, by its task. Tokenizers and image processors are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftfx.bases.tasks import FEATURES, HEARING
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError, first_line
from peftfx.serving.load import load
from peftfx.serving.made_for import task_of_directory
from peftfx.serving.served import Served

_IMAGES = frozenset({"image-classification", "image-segmentation", "object-detection", "depth-estimation"})
_PIXELS, _TOKENS = "pixel_values", "input_ids"
_OF_IMAGES = "image-feature-extraction"  #: transformers' name of the task of features, for images


def pipeline(model: str | Path | Served, task: str | None = None) -> Any:
    """Make a transformers pipeline that runs an exported model in ONNX Runtime.

        classify = peftfx.runtime.pipeline("out")
        classify(["good", "bad"])

    Args:
        model: a directory that `peftfx export` wrote, or a model that `load` returned.
        task: the task, by transformers' name; by default the task that the exported model was made for.

    Raises:
        PeftfxError: the task is unknown, or the directory lacks a tokenizer or image processor.
    """
    import transformers
    from transformers.pipelines.base import PipelineException
    from transformers.utils import logging

    served = model if isinstance(model, Served) else load(model)
    task = task_of_directory(served.directory, task)
    parts: dict[str, Any] = {}
    if sees := sees_alone(served, task):
        parts["image_processor"] = image_processor(served.directory)
    elif task in HEARING:
        parts["feature_extractor"] = feature_extractor(served.directory)
    if not sees and task != "audio-classification":
        parts["tokenizer"] = served.tokenizer
    before = logging.get_verbosity()
    logging.set_verbosity(50)  # critical only: transformers warns that it does not know the class
    try:
        with understanding(task, "transformers has no pipeline for this", "name another task", also=PipelineException):
            named = _OF_IMAGES if sees and task == FEATURES else task
            return transformers.pipeline(named, model=served, device="cpu", **parts)  # type: ignore[call-overload]
    finally:
        logging.set_verbosity(before)


def sees_alone(served: Served, task: str) -> bool:
    """Say whether a model reads images and no texts for its task."""
    return task in _IMAGES or (
        task == FEATURES and _PIXELS in served.model.inputs and _TOKENS not in served.model.inputs
    )


def feature_extractor(directory: Path) -> Any:
    """Load the feature extractor, which turns a recording into a model's input.

    Raises:
        PeftfxError: the directory has no feature extractor.
    """
    from transformers import AutoFeatureExtractor

    with understanding(directory, "no feature extractor can be loaded", "put the base model's processor files there"):
        return AutoFeatureExtractor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def image_processor(directory: Path) -> Any:
    """Load the image processor, which turns an image into a model's input.

    Raises:
        PeftfxError: the directory has no image processor.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"no image processor can be loaded: {first_line(error)}"
        hint = "put the base model's preprocessor_config.json there"
        raise PeftfxError(what, str(directory), hint) from error
