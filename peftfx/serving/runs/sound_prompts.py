"""Run prompts with sounds: a model of text and sounds streams a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.beside_text.sounds import ServedWithSounds
from peftfx.serving.load import load
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.beside_prompts import (
    TEXT,
    WITH_SOUNDS,
    processed,
    processor_of,
    taken_by_graphs,
    written_after,
)
from peftfx.serving.runs.fitting import WRITING, refuse_idle
from peftfx.serving.sound import read_wav, resample


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Continue the prompt with its sounds, writing each word to `out` as it is generated.

    Sounds go where the prompt has the processor's token of sounds (`<|audio|>`), or else before the prompt. With a chat
    template, they go where the template puts them.

    Raises:
        PeftfxError: the model reads no sounds in a text, its directory has no processor or chat template, or the
            processor's outputs do not fit the inputs of the graphs.
    """
    refuse_idle(asked, "writes a text about sounds", *WRITING, "chat")
    model = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if not isinstance(model, ServedWithSounds):
        what = "this export has no graph of sounds that a prompt could have"
        hint = "leave --prompt or --audio out; or export a model of text and sounds with --view decode"
        raise PeftfxError(what, str(asked.directory), hint)
    processor = processor_of(asked.directory, WITH_SOUNDS)
    part = next(found for name in WITH_SOUNDS.parts if (found := getattr(processor, name, None)) is not None)
    rate = int(getattr(part, "sampling_rate", 16_000))
    heard = [resample(*read_wav(path), rate).numpy() for path in asked.sounds]
    hint = "give as many sounds as the prompt has tokens of sounds, and no more than one if the processor takes no more"
    with understanding(asked.directory, "the processor does not take these sounds", hint):
        made = processed(processor, asked, WITH_SOUNDS, heard, model.sounds.token)
    idle = {"labels", *getattr(processor, "unused_input_names", ())}
    inputs = taken_by_graphs(made, _known(model, made), asked.directory, idle)
    yield written_after(model, processor.tokenizer, inputs, asked, {"audio": asked.sounds}, out)


def _known(model: ServedWithSounds, made: dict[str, Any]) -> tuple[str, ...]:
    """Return the outputs of a processor that the graphs take; which pieces count, only if it says so."""
    picks = model.sounds.picks
    return (*TEXT, *(name for name in model.sounds.names if name != picks or name in made))
