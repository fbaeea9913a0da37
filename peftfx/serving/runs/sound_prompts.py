"""Run prompts with sounds, and perhaps with images too: a model streams a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.beside_text.images import ServedWithImages
from peftfx.serving.beside_text.sounds import Hearing
from peftfx.serving.load import load
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.beside_prompts import (
    TEXT,
    WITH_IMAGES,
    WITH_SOUNDS,
    GivenBeside,
    idle_outputs,
    processed,
    processor_of,
    taken_by_graphs,
    types_in,
    written_after,
)
from peftfx.serving.runs.fitting import WRITING, refuse_idle
from peftfx.serving.runs.image_prompts import read_image, sized
from peftfx.serving.sound import read_wav, resample


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Continue the prompt with its sounds and images, writing each word to `out` as it is generated.

    Sounds go where the prompt has the processor's token of sounds (`<|audio|>`), or else before the prompt, behind its
    images. With a chat template, they go where the template puts them.

    Raises:
        PeftfxError: the model reads no sounds, or no images, in a text, its directory has no processor or chat
            template, or the processor's outputs do not fit the inputs of the graphs.
    """
    refuse_idle(asked, "writes a text about sounds", *WRITING, "chat")
    model = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if not isinstance(model, Hearing):
        what = "this export has no graph of sounds that a prompt could have"
        hint = "leave --prompt or --audio out; or export a model of text and sounds with --view decode"
        raise PeftfxError(what, str(asked.directory), hint)
    if asked.images and not isinstance(model, ServedWithImages):
        what = "this export has no graph of images that a prompt could have beside sounds"
        raise PeftfxError(what, str(asked.directory), "leave --image out")
    images = model.images if isinstance(model, ServedWithImages) else None
    kinds = (WITH_IMAGES, WITH_SOUNDS) if asked.images else (WITH_SOUNDS,)
    processor = processor_of(asked.directory, *kinds)
    given = [GivenBeside(WITH_SOUNDS, _heard(asked, processor), model.sounds.token)]
    if images is not None and asked.images:
        pictures = [sized(read_image(path), images.picture) for path in asked.images]
        given.insert(0, GivenBeside(WITH_IMAGES, pictures, images.token))
    beside = {kind.plural: kind for kind in kinds}
    hint = "give as many {0} as the prompt has tokens of {0}, and no more than one if the processor takes no more"
    words = " and ".join(beside)
    with understanding(asked.directory, f"the processor does not take these {words}", hint.format(words)):
        made = processed(processor, asked, *given)
    known = (*TEXT, *_sounds_in(model, made))
    if images is not None:
        known = (*known, *types_in(images, made), *(images.names if asked.images else ()))
    idle = idle_outputs(images, made) | {*getattr(processor, "unused_input_names", ())}
    inputs = taken_by_graphs(made, known, asked.directory, idle)
    files = {"images": asked.images} if asked.images else {}
    yield written_after(model, processor.tokenizer, inputs, asked, {**files, "audio": asked.sounds}, out)


def _heard(asked: Asked, processor: Any) -> list[Any]:
    """Return the samples of each recording, at the rate of the processor."""
    part = next(found for name in WITH_SOUNDS.parts if (found := getattr(processor, name, None)) is not None)
    rate = int(getattr(part, "sampling_rate", 16_000))
    return [resample(*read_wav(path), rate).numpy() for path in asked.sounds]


def _sounds_in(model: Hearing, made: dict[str, Any]) -> tuple[str, ...]:
    """Return the outputs of a processor that the graph of sounds takes; which pieces count, only if it says so."""
    picks = model.sounds.picks
    return tuple(name for name in model.sounds.names if name != picks or name in made)
