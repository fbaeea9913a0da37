"""Asked: what a user asks `peftfx run` for, checked before anything large is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from peftfx.bases.tasks import check_task
from peftfx.errors import PeftfxError


@dataclass(frozen=True)
class Asked:
    """What was asked for. Which of the inputs are given says what kind of run it is.

    Attributes:
        directory: that `peftfx export` wrote.
        prompt: text to continue.
        texts: for the model's task.
        images: image files, for the model's task.
        task: a pipeline's name; None is what the model was made for.
        top: how many labels to tell.
        adapter: an `.onnx_adapter` file to put into the model.
        max_new_tokens: where generation stops, if the model does not stop first.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
        chat: put the prompt into the model's chat template.
    """

    directory: Path
    prompt: str | None = None
    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    task: str | None = None
    top: int = 5
    adapter: Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    chat: bool = False

    def check(self) -> None:
        """Refuse an unknown task, files that are not there, and nothing to run on, or inputs of more than one kind.

        Raises:
            PeftfxError: see above.
        """
        if self.task is not None:
            check_task(self.task)
        if (self.prompt is None) == (not (self.texts or self.images)):
            hint = "pass --prompt, or --text, or --image"
            raise PeftfxError("give one input: a prompt, texts or images", "run", hint)
        missing = next((path for path in self.images if not os.path.isfile(path)), None)
        if missing is not None:
            raise PeftfxError("there is no such image", str(missing), "check the path")

    @property
    def kind(self) -> str:
        """The name of the file of `runs` that does it."""
        return "prompts" if self.prompt is not None else "labels"


@dataclass(frozen=True)
class Found:
    """One result.

    Attributes:
        value: of plain values, as JSON has them.
        words: for a reader; empty if they are written already, None if the value itself is what to read.
    """

    value: Any
    words: str | None = None


Run = Callable[[Asked, TextIO | None], Iterator[Found]]
"""Does what was asked for; words are written to the file as they come, if there is one."""


def runner(asked: Asked) -> Run:
    """What does this kind of run."""
    run: Run = import_module(f"peftfx.serving.runs.{asked.kind}").run
    return run
