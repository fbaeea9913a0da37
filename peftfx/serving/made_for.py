"""Find out the task that an exported directory was made for."""

from __future__ import annotations

from pathlib import Path

from peftfx.bases.tasks import task_of_class
from peftfx.errors import PeftfxError
from peftfx.files import is_file, read_json
from peftfx.formats import REPORT, read_stamped


def task_of_directory(directory: Path) -> str:
    """Return the task of the model in an exported directory, by its report, or else by its config.

    Raises:
        PeftfxError: neither file says the task.
    """
    for name, key in ((REPORT, "model"), ("config.json", "architectures")):
        path = directory / name
        if is_file(path):
            read = read_stamped if name == REPORT else read_json
            found = read(path, "export the model again").get(key)
            named = found[0] if isinstance(found, list) and found else found
            if isinstance(named, str) and (task := task_of_class(named)) is not None:
                return task
    raise PeftfxError("the model's files do not tell its task", str(directory), "name the task")
