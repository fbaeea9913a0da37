"""Transcribe or label recordings, which the model's own feature extractor prepares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from torch import Tensor

from peftfx.bases.tasks import HEARING
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.beside_text.sounds import Hearing
from peftfx.serving.generators import ServedSeq2Seq
from peftfx.serving.load import load
from peftfx.serving.made_for import task_of_directory
from peftfx.serving.pipelines import feature_extractor, pipeline
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import WRITING, refuse_idle
from peftfx.serving.runs.streaming import generation_options
from peftfx.serving.served import Served
from peftfx.serving.sound import read_wav, resample

TRANSCRIBED, _ = HEARING
PIECE = 30.0  #: seconds of a piece of a long recording, for a model without a decoder
_DOES_NOT_TAKE = "the model does not take this recording"


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Yield what is said in each recording, or its labels.

    Raises:
        PeftfxError: the model is for another task, lacks a tokenizer or feature extractor, or does not support the
            asked language or timestamps; or a file is not a WAV file.
    """
    served = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if isinstance(served, Hearing):
        what = "this model writes about sounds that are in a prompt"
        raise PeftfxError(what, str(served.directory), 'pass --prompt too, such as --prompt "What is said?"')
    task = task_of_directory(served.directory, asked.task)
    if task not in HEARING:
        raise PeftfxError("this model does not take sound", task, "pass --text, --prompt or --image")
    extractor = feature_extractor(served.directory)
    if task == TRANSCRIBED and isinstance(served, ServedSeq2Seq):
        refuse_idle(asked, "transcribes speech", *WRITING, "language", "translate", "timestamps")
        hear: Any = Transcriber(served, extractor, asked)
    else:
        _refuse_options(asked)
        refuse_idle(asked, f"does the task {task}", *(() if task == TRANSCRIBED else ("top",)))
        hear = _Labels(served, task, int(extractor.sampling_rate), asked.most_labels)
    for path in asked.sounds:
        sound, rate = read_wav(path)
        with understanding(path, _DOES_NOT_TAKE, "pass --verbose to see the cause"):
            found = hear(resample(sound, rate, int(extractor.sampling_rate)))
        yield Found(found if isinstance(found, list) else {"audio": str(path), **found}, _words(found))


def _refuse_options(asked: Asked) -> None:
    for name in ("language", "translate", "timestamps"):
        if getattr(asked, name):
            what = "this model cannot choose a language, translate or give timestamps"
            raise PeftfxError(what, f"--{name}", "leave it out")


def _words(found: Any) -> str | None:
    """Return the text to show: with timestamps, a line for each piece. Labels are shown as values (None)."""
    if isinstance(found, list):
        return None
    if "segments" not in found:
        return str(found["text"])
    return "\n".join(f"[{piece['start']:.2f} - {piece['end']:.2f}] {piece['text']}" for piece in found["segments"])


@dataclass
class _Labels:
    """transformers' pipeline over a model that gives its whole answer at once: the spoken letters, or labels."""

    served: Served
    task: str
    rate: int
    top: int

    def __post_init__(self) -> None:
        self.pipeline = pipeline(self.served, self.task)

    def __call__(self, heard: Tensor) -> Any:
        given = {"raw": heard.numpy(), "sampling_rate": self.rate}
        if self.task != TRANSCRIBED:
            return self.pipeline(given, top_k=self.top)
        long = len(heard) > PIECE * self.rate and hasattr(self.served.config, "inputs_to_logits_ratio")
        return {"text": self.pipeline(given, **({"chunk_length_s": PIECE} if long else {}))["text"]}


class Transcriber:
    """A model that transcribes speech token by token, by the `generate` of its own class.

    A recording that is longer than the feature extractor's window is read piece by piece. The model's class does this
    itself if it predicts timestamps. Otherwise the recording is cut into pieces of the window's length.

    Args:
        served: the model.
        extractor: the feature extractor, which turns a recording into the model's input.
        asked: what the user asks for.

    Raises:
        PeftfxError: the model cannot do what was asked for.
    """

    def __init__(self, served: ServedSeq2Seq, extractor: Any, asked: Asked) -> None:
        self.served, self.extractor, self.asked = served, extractor, asked
        self.tokenizer, self.source = served.tokenizer, served.main_input_name
        if self.source not in extractor.model_input_names:
            made = ", ".join(extractor.model_input_names)
            what = f"the feature extractor makes {made}, but the model reads {self.source}"
            raise PeftfxError(what, str(served.directory), "copy the base model's preprocessor_config.json again")
        self.options = generation_options(asked)
        wanted = {
            "language": asked.language,
            "task": "translate" if asked.translate else None,
            "return_timestamps": asked.timestamps or None,
        }
        for (name, value), flag in zip(wanted.items(), ("language", "translate", "timestamps"), strict=True):
            if value is not None and name not in served.options:
                raise PeftfxError(f"this model does not support --{flag}", str(served.directory), "leave it out")
        self.options |= {name: value for name, value in wanted.items() if value is not None}
        if asked.timestamps:
            self.options["return_segments"] = True

    def __call__(self, heard: Tensor) -> dict[str, Any]:
        most = getattr(self.extractor, "n_samples", None)
        if most is None or len(heard) <= most:
            return self._said(self._features(heard))
        if "return_timestamps" in self.served.options and self._tells_times:
            whole = self._features(heard, truncation=False, padding="longest")
            return self._said(whole, return_timestamps=True)
        if self.asked.timestamps:
            what = "this model's generation config has no `no_timestamps_token_id`: it gives no timestamps"
            raise PeftfxError(what, str(self.served.directory), "leave --timestamps out")
        pieces = [self._said(self._features(piece))["text"].strip() for piece in heard.split(most)]
        return {"text": " ".join(pieces)}

    @property
    def _tells_times(self) -> bool:
        return getattr(self.served.generation_config, "no_timestamps_token_id", None) is not None

    def _features(self, heard: Tensor, **options: object) -> Tensor:
        rate = int(self.extractor.sampling_rate)
        made: Tensor = self.extractor(heard.numpy(), sampling_rate=rate, return_tensors="pt", **options)[self.source]
        return made.to(self.served.dtype)

    def _said(self, features: Tensor, **more: object) -> dict[str, Any]:
        found: Any = self.served.generate(features, **{**self.options, **more, "return_dict_in_generate": False})
        if not isinstance(found, dict):
            return {"text": self._text(found[0])}
        pieces = [
            {"start": float(piece["start"]), "end": float(piece["end"]), "text": self._text(piece["tokens"])}
            for piece in found["segments"][0]
        ]
        return {"text": self._text(found["sequences"][0]), "segments": pieces}

    def _text(self, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
