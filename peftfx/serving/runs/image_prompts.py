"""Run prompts with images, or images alone: a model of text and images streams a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from peftfx.bases.chats import filled_template
from peftfx.bases.processors.beside_text import CROSS_MASK
from peftfx.bases.processors.token_types import MODALITIES, TYPES
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.generators import ServedSeq2Seq
from peftfx.serving.image_generators import ServedOverImages, ServedSeq2SeqWithImages, ServedWithImages
from peftfx.serving.load import load
from peftfx.serving.pipelines import image_processor
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import WRITING, refuse_idle, refuse_task_of_prompt
from peftfx.serving.runs.streaming import Writer, generation_options, room
from peftfx.views.images.encoded import Images

PIXELS = "pixel_values"
_TEXT = ("input_ids", "attention_mask")


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
    processor = processor_of(asked.directory)
    tokenizer = processor.tokenizer
    assert asked.prompt is not None
    images = [_sized(read_image(path), model.images.picture) for path in asked.images]
    hint = "give as many images as the prompt has image tokens, or pass --verbose to see the cause"
    with understanding(asked.directory, "the processor does not take these images", hint):
        made = _processed(processor, asked, images, model.images.token)
    masks = (CROSS_MASK,) if isinstance(model, ServedOverImages) else ()
    inputs = _taken(model.images, made, asked.directory, masks)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    before = inputs["input_ids"].shape[1] if model.pads_left else 1  # a decoder begins with a start token
    options = generation_options(asked, room(model, before)) | {"pad_token_id": pad}
    writer = Writer(model, tokenizer, out)
    tokens = writer.generate(**inputs, **options)
    text = str(tokenizer.decode(tokens[0, before:], skip_special_tokens=True))
    told = {"prompt": asked.prompt, "images": [str(path) for path in asked.images], "text": text}
    yield Found(told, writer.words(text))


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


def processor_of(directory: Path) -> Any:
    """Load the processor of text and images in a directory.

    Raises:
        PeftfxError: the directory has no processor, or the processor takes no images.
    """
    from transformers import AutoProcessor

    with understanding(directory, "no processor can be loaded", "put the base model's processor files there"):
        found = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        what, hint = "the directory has no processor of text and images", "put the base model's processor files there"
        raise PeftfxError(what, str(directory), hint)
    return found


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


def _sized(image: Any, picture: tuple[int, ...]) -> Any:
    """Return an image resized to the height and width of the export, if these were chosen."""
    if not picture or (image.height, image.width) == picture:
        return image
    return image.resize((picture[1], picture[0]))


def with_image_tokens(processor: Any, prompt: str, count: int) -> str:
    """Return the prompt with an image token before it for each image, unless it has image tokens already."""
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str) or token in prompt:
        return prompt
    return token * count + prompt


def _templated(processor: Any, asked: Asked) -> str:
    content = [*({"type": "image"} for _ in asked.images), {"type": "text", "text": asked.prompt}]
    said = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": False}
    return str(filled_template(processor, said, str(asked.directory), "leave --chat out", **options))


def _processed(processor: Any, asked: Asked, images: list[Any], token: int) -> dict[str, Any]:
    """Return what the processor makes of the prompt and its images, given the token of a piece of an image.

    Some processors put image tokens before a prompt themselves, and others want them in it.
    """
    assert asked.prompt is not None
    if asked.chat:
        return dict(processor(text=_templated(processor, asked), images=images, return_tensors="pt"))
    with suppress(Exception):  # whatever a processor raises for a prompt without its image tokens
        made = dict(processor(text=asked.prompt, images=images, return_tensors="pt"))
        if bool((made["input_ids"] == token).any()):
            return made
    text = with_image_tokens(processor, asked.prompt, len(images))
    return dict(processor(text=text, images=images, return_tensors="pt"))


def _taken(images: Images, made: dict[str, Any], directory: Path, masks: tuple[str, ...]) -> dict[str, Tensor]:
    """Return those outputs of the processor that the graphs take, with these masks of images.

    Raises:
        PeftfxError: the processor makes other outputs, which the graphs would not see, or lacks one.
    """
    kinds = (MODALITIES,) if (images.sections or images.typed) and MODALITIES in made else ()
    types = (TYPES,) if images.typed and not kinds else ()
    known = (*_TEXT, *types, *kinds, *masks, *images.names)
    idle = {name for name in made if name.endswith(TYPES) and not made[name].any()}
    idle.add("labels")  # which are to train on
    lost = [name for name in made if name not in known and name not in idle]
    missing = [name for name in known if name not in made]
    if lost or missing:
        name = (lost or missing)[0]
        what = f"the processor makes {name}, which the graphs do not take" if lost else f"the processor makes no {name}"
        raise PeftfxError(what, str(directory), "run the model by transformers, or export its forward view")
    return {name: made[name] for name in known}
