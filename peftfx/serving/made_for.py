"""Find out the task that an exported directory was made for."""

from __future__ import annotations

from pathlib import Path

from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.bases.tasks import HEARING, resolve_task, task_of_class
from peftfx.errors import PeftfxError
from peftfx.files import is_file, read_json
from peftfx.formats import REPORT, read_stamped

_CLASSES_OF_TEXT, (_, _CLASSES_OF_SOUND) = "text-classification", HEARING


def task_of_directory(directory: Path, asked: str | None = None) -> str:
    """Return the task of the model in an exported directory: the one that is asked for, or what the files tell.

    The report tells it, or else the config. Classes that classify sequences are named alike for texts and for sound;
    the inputs in the report tell them apart.

    Raises:
        PeftfxError: neither file says the task, or there is no task of the name that is asked for.
    """
    if asked is not None:
        return resolve_task(asked)
    for name, key in ((REPORT, "model"), ("config.json", "architectures")):
        path = directory / name
        if is_file(path):
            read = read_stamped if name == REPORT else read_json
            told = read(path, "export the model again")
            found = told.get(key)
            named = found[0] if isinstance(found, list) and found else found
            if isinstance(named, str) and (task := task_of_class(named)) is not None:
                sound = task == _CLASSES_OF_TEXT and _hears(told.get("inputs"))
                return _CLASSES_OF_SOUND if sound else task
    raise PeftfxError("the model's files do not tell its task", str(directory), "name the task")


def _hears(inputs: object) -> bool:
    """Return whether these are the inputs of a model that hears."""
    return isinstance(inputs, dict) and any(name in inputs for name in RECORDINGS)
