"""Run prompts with images or videos, or images alone: a model of text and images streams a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from peftfx.bases.processors.beside_text import CROSS_MASK
from peftfx.bases.processors.token_types import MODALITIES
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.beside_text.images import ServedOverImages, ServedSeq2SeqWithImages, ServedWithImages
from peftfx.serving.beside_text.videos import ServedWithVideos
from peftfx.serving.generators import ServedSeq2Seq
from peftfx.serving.load import load
from peftfx.serving.pipelines import image_processor
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.beside_prompts import (
    TEXT,
    WITH_IMAGES,
    WITH_VIDEOS,
    GivenBeside,
    idle_outputs,
    processed,
    processor_of,
    taken_by_graphs,
    types_in,
    written_after,
)
from peftfx.serving.runs.fitting import WRITING, refuse_idle, refuse_task_of_prompt
from peftfx.serving.runs.streaming import Writer, generation_options

PIXELS = "pixel_values"


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Continue the prompt with its images, writing each word to `out` as it is generated.

    Images go where the prompt has the processor's image token (`<image>`). If it has no such token, they go where
    the processor puts them, or before the prompt. With a chat template, they go where the template puts them. An
    encoder-decoder that reads an image alone describes each image; a prompt is how each text begins.

    Raises:
        PeftfxError: the model reads no images, its directory has no processor or chat template, or the processor's
            outputs do not fit the inputs of the graphs.
    """
    refuse_task_of_prompt(asked)
    refuse_idle(asked, "writes a text about images", *WRITING, "chat")
    model = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if isinstance(model, ServedSeq2Seq) and model.main_input_name == PIXELS:
        yield from _described(model, asked, out)
        return
    if not isinstance(model, ServedWithImages | ServedSeq2SeqWithImages | ServedOverImages):
        what = "this export has no graph of images that a prompt could have"
        hint = "leave --image out; or export a model of text and images with --view decode, and read its warnings"
        raise PeftfxError(what, str(asked.directory), hint)
    if asked.videos:
        yield _about_videos(model, asked, out)
        return
    processor = processor_of(asked.directory, WITH_IMAGES)
    assert asked.prompt is not None
    images = [sized(read_image(path), model.images.picture) for path in asked.images]
    hint = "give as many images as the prompt has image tokens, or pass --verbose to see the cause"
    with understanding(asked.directory, "the processor does not take these images", hint):
        made = processed(processor, asked, GivenBeside(WITH_IMAGES, images, model.images.token))
    masks = (CROSS_MASK,) if isinstance(model, ServedOverImages) else ()
    known = (*TEXT, *types_in(model.images, made), *masks, *model.images.names)
    inputs = taken_by_graphs(made, known, asked.directory, idle_outputs(model.images, made))
    yield written_after(model, processor.tokenizer, inputs, asked, {"images": asked.images}, out)


def _about_videos(model: object, asked: Asked, out: TextIO | None) -> Found:
    """Continue the prompt with its videos. All frames are taken, resized to the size of the export."""
    if not isinstance(model, ServedWithVideos):
        what, hint = "this export has no graph of videos", "export the model with --view decode --videos"
        raise PeftfxError(what, str(asked.directory), hint)
    processor = processor_of(asked.directory, WITH_VIDEOS)
    videos = [np.stack(_frames(path, model.videos.picture)) for path in asked.videos]
    hint = "give as many videos as the prompt has video tokens, or pass --verbose to see the cause"
    with understanding(asked.directory, "the processor does not take these videos", hint):
        given = GivenBeside(WITH_VIDEOS, videos, model.videos.token)
        made = processed(processor, asked, given, do_sample_frames=False)
    places = tuple(name for name in model.of_positions if name in made)
    kinds = (MODALITIES,) if model.images.sections and MODALITIES in made else ()
    known = (*TEXT, *kinds, *places, *model.videos.names)
    inputs = taken_by_graphs(made, known, asked.directory, idle_outputs(model.images, made))
    return written_after(model, processor.tokenizer, inputs, asked, {"videos": asked.videos}, out)


def _frames(folder: Path, picture: tuple[int, ...]) -> list[Any]:
    """Return the frames of a video, [height, width, channels] each."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    frames = [sized(read_image(path), picture) for path in paths]
    if not frames or len({frame.size for frame in frames}) > 1:
        what = "the frames of this video have different sizes" if frames else "this folder has no images"
        raise PeftfxError(what, str(folder), "put the frames of one video there, as PNG or JPEG")
    return [np.asarray(frame) for frame in frames]


def _described(model: ServedSeq2Seq, asked: Asked, out: TextIO | None) -> Iterator[Found]:
    """Write a text for each image, or what follows the prompt, with which each text begins."""
    refuse_idle(asked, "writes a text about an image alone", *WRITING)
    prepare, tokenizer = image_processor(asked.directory), model.tokenizer
    writer = Writer(model, tokenizer, out)
    options = generation_options(asked)
    begins = tokenizer(asked.prompt or "", add_special_tokens=False, return_tensors="pt")["input_ids"].long()
    if count := begins.shape[1]:
        options["decoder_input_ids"] = begins
    for path in asked.images:
        pixels = prepare(read_image(path), return_tensors="pt")[PIXELS].to(model.dtype)
        with understanding(path, "the model does not take this image", "pass --verbose to see the cause"):
            tokens = writer.generate(pixels, **options)
        before = count + int(not torch.equal(tokens[:1, :count], begins))  # transformers may put a start token first
        text = str(tokenizer.decode(tokens[0, before if count else 0 :], skip_special_tokens=True))
        told = {"prompt": asked.prompt} if asked.prompt else {}
        yield Found({**told, "image": str(path), "text": text}, writer.words(text))


def read_image(path: Path) -> Any:
    """Read an image file as RGB, turned as its EXIF data say; greys of 16 bits keep their upper 8.

    Raises:
        PeftfxError: the image cannot be read, or its values are of 32 bits, which do not say what white is.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F"):
                what, hint = "this image has values of 32 bits, which do not say what white is", "save it with 8 bits"
                raise PeftfxError(what, str(path), hint)
            if image.mode.startswith("I;16"):  # Pillow takes all above 255 for white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PeftfxError(f"this image cannot be read: {error}", str(path), "give a PNG or a JPEG") from error


def sized(image: Any, picture: tuple[int, ...]) -> Any:
    """Return an image resized to the height and width of the export, if these were chosen."""
    if not picture or (image.height, image.width) == picture:
        return image
    return image.resize((picture[1], picture[0]))
