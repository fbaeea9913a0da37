"""Pipelines: transformers' own pipelines over an exported directory, by its task. Tokenizers and images stay theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftfx.bases.tasks import resolve_task, task_of_class
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError, first_line
from peftfx.files import is_file, read_json
from peftfx.formats import REPORT, read_stamped
from peftfx.serving.load import load
from peftfx.serving.served import Served

_IMAGES = frozenset({"image-classification", "image-segmentation"})


def pipeline(model: str | Path | Served, task: str | None = None) -> Any:
    """A transformers pipeline that runs an exported model in ONNX Runtime.

        classify = peftfx.runtime.pipeline("out")
        classify(["good", "bad"])

    Args:
        model: a directory that `peftfx export` wrote, or what `load` gave for it.
        task: by transformers' names; by default what the exported model was made for.

    Raises:
        PeftfxError: the task cannot be told, or the directory lacks a tokenizer or image processor.
    """
    import transformers
    from transformers.utils import logging

    served = model if isinstance(model, Served) else load(model)
    task = task_of_directory(served.directory) if task is None else resolve_task(task)
    parts = {"image_processor": _image_processor(served.directory)} if task in _IMAGES else {}
    if not parts:
        parts = {"tokenizer": served.tokenizer}
    before = logging.get_verbosity()
    logging.set_verbosity(50)  # critical: it says that it does not know the class
    try:
        with understanding(task, "transformers has no pipeline for this", "name another task"):
            return transformers.pipeline(task, model=served, device="cpu", **parts)  # type: ignore[call-overload]
    finally:
        logging.set_verbosity(before)


def task_of_directory(directory: Path) -> str:
    """What the model in an exported directory is for, by its report, else by its config.

    Raises:
        PeftfxError: neither says it.
    """
    for name, key in ((REPORT, "model"), ("config.json", "architectures")):
        path = directory / name
        if is_file(path):
            read = read_stamped if name == REPORT else read_json
            found = read(path, "export the model again").get(key)
            named = found[0] if isinstance(found, list) and found else found
            if isinstance(named, str) and (task := task_of_class(named)) is not None:
                return task
    raise PeftfxError("what this model is for cannot be told", str(directory), "name the task")


def _image_processor(directory: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"no image processor can be loaded: {first_line(error)}"
        hint = "put the base model's preprocessor_config.json there"
        raise PeftfxError(what, str(directory), hint) from error
