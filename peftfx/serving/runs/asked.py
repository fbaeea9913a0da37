"""The user's request to `peftfx run`. It is checked before large libraries are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from peftfx.bases.tasks import SENTENCES, check_task
from peftfx.errors import PeftfxError, shown


@dataclass(frozen=True)
class Asked:
    """The user's request. The inputs that are given decide the kind of run.

    Attributes:
        directory: the directory that `peftfx export` wrote.
        prompt: the text to continue.
        texts: the texts for the model's task.
        images: the image files for the model's task, or for the prompt.
        videos: folders, each with the frames of a video for the prompt as images, in the order of their names.
        sounds: the WAV files for the model's task, or for the prompt.
        task: the name of a pipeline; None means the task that the model was made for.
        top: the number of labels to show, by default 5.
        adapter: an `.onnx_adapter` file to load into the model, or the name of an adapter of a batched export.
        providers: the execution providers of ONNX Runtime; see `peftfx.serving.providers`.
        query: a text with which each of the texts is compared.
        prompt_name: the name of the prompt that is put before texts to embed.
        save: the `.npy` file to write embeddings to.
        output: the `.png` file to write the segments of an image to.
        max_new_tokens: the most tokens to generate; by default 128 for a continuation, and for a transcription the
            number in the model's generation config.
        temperature: the temperature of sampling; 0 always takes the likeliest token.
        seed: the seed of sampling.
        chat: put the prompt into the model's chat template.
        language: the spoken language; None lets the model find out, if it can.
        translate: translate the speech to English, if the model can.
        timestamps: say when each piece was spoken, if the model can.
    """

    directory: Path
    prompt: str | None = None
    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()
    task: str | None = None
    top: int | None = None
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
        """Refuse an unknown task, missing files, impossible numbers, no input, and inputs of more than one kind.

        Raises:
            PeftfxError: the task is unknown, a file is missing or cannot be written, a number is too small, or there is
                not exactly one kind of input.
        """
        self._check_values()
        if self.task is not None:
            check_task(self.task)
        if self.query is not None and not self.texts:
            raise PeftfxError("there are no texts to compare with the query", "run", "pass --text or --texts too")
        self._check_videos()
        seen = self.images or self.videos
        described = self.prompt is not None and bool(seen or self.sounds) and not self.texts
        given = (self.prompt is not None, bool(self.texts or self.images), bool(self.sounds))
        if sum(given) != 1 and not described:
            hint = "pass --prompt, or --text, or --image, or --audio; a prompt may have images and recordings"
            raise PeftfxError("run takes exactly one of a prompt, texts, images and recordings", "run", hint)
        for kind, paths in (("image", self.images), ("recording", self.sounds)):
            missing = next((path for path in paths if not os.path.isfile(path)), None)
            if missing is not None:
                raise PeftfxError(f"there is no such {kind}", str(missing), "check the path")

    def _check_videos(self) -> None:
        for path in self.videos:
            if not os.path.isdir(path):
                what = "a video is a folder with its frames as images, in the order of their names"
                hint = "write its frames, for example by ffmpeg -i FILE -r 2 FOLDER/%05d.png"
                raise PeftfxError(what, str(path), hint)
        if self.videos and (self.prompt is None or self.images or self.sounds):
            what = "videos go with a prompt, and with no images and recordings"
            raise PeftfxError(what, "--video", "pass --prompt, and one kind of the others")

    def _check_values(self) -> None:
        least = {
            "--top": (self.top, 1),
            "--max-new-tokens": (self.max_new_tokens, 1),
            "--temperature": (self.temperature, 0),
        }
        for flag, (value, fewest) in least.items():
            if value is not None and not value >= fewest:
                raise PeftfxError(f"{flag} must be {fewest} or more, not {value}", flag, f"give {fewest} or more")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise PeftfxError(
                f"--seed is {shown(self.seed)}, which is too large for torch", "--seed", "give fewer digits"
            )
        if self.seed is not None and not self.temperature:
            what = "--seed has no effect here: without a temperature the most likely token is taken"
            raise PeftfxError(what, "--seed", "pass --temperature too, or leave it out")
        for flag, path, ending in (("--save", self.save, ".npy"), ("--output", self.output, ".png")):
            if path is not None and path.suffix.lower() not in ("", ending):
                raise PeftfxError(
                    f"{flag} writes a {ending} file, and this has another name",
                    str(path),
                    f"name it {path.stem}{ending}",
                )
            if path is not None and not os.path.isdir(path.parent):
                raise PeftfxError(
                    f"{flag} is a file in a folder that does not exist", str(path), "make the folder first"
                )

    @property
    def most_labels(self) -> int:
        """The number of labels to show."""
        return 5 if self.top is None else self.top

    @property
    def kind(self) -> str:
        """The name of the module in `runs` that does this kind of run."""
        if self.sounds:
            return "sounds" if self.prompt is None else "sound_prompts"
        if self.texts and self.task in (None, SENTENCES):
            from peftfx.bases.sentences.modules import SentenceModules

            if SentenceModules.found([self.directory]) is not None:
                return "sentences"
        if self.query is not None:
            return "pairs"
        if self.prompt is None:
            return "labels"
        return "image_prompts" if self.images or self.videos else "prompts"


@dataclass(frozen=True)
class Found:
    """One result of a run.

    Attributes:
        value: the result as plain values, for JSON.
        words: the result as text; empty if it has been printed already, None if the value itself is shown.
    """

    value: Any
    words: str | None = None


Run = Callable[[Asked, TextIO | None], Iterator[Found]]
"""A function that does what was asked for. If it gets a file, it writes words to the file as they are generated."""


def runner(asked: Asked) -> Run:
    """Return the function for this kind of run.

    Raises:
        PeftfxError: an option does not fit this kind of run.
    """
    if asked.output is not None and asked.kind != "labels":
        raise PeftfxError("--output is only for the segments of an image", "--output", "leave it out")
    lost = "--save" if asked.save is not None else "--prompt-name" if asked.prompt_name is not None else ""
    if lost and (asked.kind != "sentences" or asked.query is not None):
        what = f"{lost} is only for models that embed sentences"
        raise PeftfxError(what, lost, "leave it out, or run a model that embeds sentences, without --query")
    run: Run = import_module(f"peftfx.serving.runs.{asked.kind}").run
    return run


def read_texts(path: Path | None) -> tuple[str, ...]:
    """Read the lines of a file, or of the standard input for `-`, without empty lines. No path gives no lines.

    Raises:
        PeftfxError: the file cannot be read, is not text, or is empty.
    """
    if path is None:
        return ()
    try:
        read = sys.stdin.read().removeprefix("\ufeff") if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PeftfxError(
            f"this file cannot be read: {error.strerror or error}", str(path), "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise PeftfxError(f"this file is not text in UTF-8: {error}", str(path), "save it in UTF-8") from error
    found = tuple(line for line in read.split("\n") if line.strip())
    if not found:
        raise PeftfxError("the file has no text", str(path), "write each text on its own line")
    return found
