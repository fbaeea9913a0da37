"""Asked: what a user asks `peftfx run` for, checked before anything large is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from peftfx.bases.tasks import SENTENCES, check_task
from peftfx.errors import PeftfxError


@dataclass(frozen=True)
class Asked:
    """What was asked for. Which of the inputs are given says what kind of run it is.

    Attributes:
        directory: that `peftfx export` wrote.
        prompt: text to continue.
        texts: for the model's task.
        images: image files, for the model's task.
        sounds: WAV files, for the model's task.
        task: a pipeline's name; None is what the model was made for.
        top: how many labels to tell.
        adapter: an `.onnx_adapter` file to put into the model.
        providers: where ONNX Runtime computes; see `peftfx.serving.providers`.
        query: a text that each of the texts is held against.
        prompt_name: of the text that goes ahead of texts that are embedded.
        save: a `.npy` file for embeddings.
        output: a `.png` file for the segments of an image.
        max_new_tokens: where generation stops, if the model does not stop first; by default after 128 tokens of a
            continuation, and as its own generation config says of what is transcribed.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
        chat: put the prompt into the model's chat template.
        language: that is spoken; None is found out by the model, if it can.
        translate: give what is said in English, if the model can.
        timestamps: tell when each piece was said, if the model can.
    """

    directory: Path
    prompt: str | None = None
    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()
    task: str | None = None
    top: int = 5
    adapter: Path | None = None
    providers: tuple[str, ...] = ()
    query: str | None = None
    prompt_name: str | None = None
    save: Path | None = None
    output: Path | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    chat: bool = False
    language: str | None = None
    translate: bool = False
    timestamps: bool = False

    def check(self) -> None:
        """Refuse an unknown task, files that are not there, and nothing to run on, or inputs of more than one kind.

        Raises:
            PeftfxError: see above.
        """
        if self.task is not None:
            check_task(self.task)
        if self.query is not None and not self.texts:
            raise PeftfxError("there are no texts to hold against the query", "run", "pass --text or --texts too")
        described = self.prompt is not None and bool(self.images) and not self.texts
        given = (self.prompt is not None, bool(self.texts or self.images) and not described, bool(self.sounds))
        if sum(given) != 1:
            hint = "pass --prompt, or --text, or --image, or --audio; a prompt may have images"
            raise PeftfxError("give one input: a prompt, texts, images or recordings", "run", hint)
        for kind, paths in (("image", self.images), ("recording", self.sounds)):
            missing = next((path for path in paths if not os.path.isfile(path)), None)
            if missing is not None:
                raise PeftfxError(f"there is no such {kind}", str(missing), "check the path")

    @property
    def kind(self) -> str:
        """The name of the file of `runs` that does it."""
        if self.sounds:
            return "sounds"
        if self.texts and self.task in (None, SENTENCES):
            from peftfx.bases.sentences.modules import SentenceModules

            if SentenceModules.found([self.directory]) is not None:
                return "sentences"
        if self.query is not None:
            return "pairs"
        if self.prompt is None:
            return "labels"
        return "image_prompts" if self.images else "prompts"


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
    """What does this kind of run.

    Raises:
        PeftfxError: something is asked for that it does not do.
    """
    if asked.output is not None and asked.kind != "labels":
        raise PeftfxError("--output is a picture of the segments of an image", "--output", "leave it out")
    lost = "--save" if asked.save is not None else "--prompt-name" if asked.prompt_name is not None else ""
    if lost and (asked.kind != "sentences" or asked.query is not None):
        what = f"{lost} is only for models that embed sentences"
        raise PeftfxError(what, lost, "leave it out, or run a model that embeds sentences, without --query")
    run: Run = import_module(f"peftfx.serving.runs.{asked.kind}").run
    return run


def read_texts(path: Path | None) -> tuple[str, ...]:
    """The lines of a file, or of the standard input for `-`, but for empty ones; none without a path.

    Raises:
        PeftfxError: it cannot be read, is no text, or has none.
    """
    if path is None:
        return ()
    try:
        read = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise PeftfxError(f"cannot be read: {error.strerror or error}", str(path), "check the path") from error
    except UnicodeDecodeError as error:
        raise PeftfxError(f"not a text in UTF-8: {error}", str(path), "save it in UTF-8") from error
    found = tuple(line for line in read.splitlines() if line.strip())
    if not found:
        raise PeftfxError("there is no text in it", str(path), "write one a line")
    return found
