"""Refuse options that a run would ignore."""

from __future__ import annotations

import dataclasses
from typing import Any

from peftfx.bases.tasks import resolve_task
from peftfx.errors import PeftfxError
from peftfx.serving.runs.asked import Asked

WRITING = ("max_new_tokens", "temperature", "seed")  #: the options of each run that generates a text
WRITERS = ("text-generation", "text2text-generation", "image-text-to-text")  #: the tasks that continue a prompt
_CHECKED = ("top", *WRITING, "chat", "language", "translate", "timestamps")


def refuse_idle(asked: Asked, what: str, *takes: str) -> None:
    """Refuse the first option that is given and is not one of those that this run takes.

    Args:
        asked: what the user asks for.
        what: what this run does, for the message.
        takes: the names of the options that it respects.

    Raises:
        PeftfxError: an option would have no effect.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(asked)}
    for name in _CHECKED:
        if name not in takes and getattr(asked, name) != defaults[name]:
            flag = f"--{name.replace('_', '-')}"
            raise PeftfxError(f"{flag} has no effect here: this run {what}", flag, "leave it out")


def refuse_task_of_prompt(asked: Asked) -> None:
    """Refuse a task that does not continue a prompt.

    Raises:
        PeftfxError: the task labels texts, or does something else with its input.
    """
    if asked.task is not None and resolve_task(asked.task) not in WRITERS:
        what = f"a prompt is continued, which is not the task {asked.task}"
        raise PeftfxError(what, "--task", "pass --text, --image or --audio for this task, or leave --task out")
