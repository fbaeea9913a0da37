"""Models that read images in their text, which transformers' `generate` encodes before the prefill."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import GenerationMixin

from peftfx.bases.processors.pictures import pictures_vary

ENCODE = "get_image_features"  #: the method of transformers' models that encodes images
ENCODED_IMAGES = "mm_encoder_outputs"  #: the argument of a forward that takes what the method gives
SIZED = "leave inputs out: an export is for pictures of one size, which --image-size HEIGHTxWIDTH (image_size=) chooses"


def reads_images(base: nn.Module) -> bool:
    """Return whether a model reads images in its text, which can be encoded apart."""
    return not why_not_read(base)


def why_not_read(base: nn.Module) -> str:
    """Return why a model's images cannot be encoded apart from its text, or nothing if they can."""
    if why := _why_not_encoded(base):
        return why
    if not takes_encoded(base):
        return f"the model's code takes no encoded images beside a text (`{ENCODED_IMAGES}`)"
    return ""


def encodes_in_forward(base: nn.Module) -> bool:
    """Return whether a model's forward reads images in its text by an encoder that can be run apart.

    The forward takes encoded images, or calls the encoder as a method of its model.
    """
    if _why_not_encoded(base) or takes_encoded(base):
        return not _why_not_encoded(base)
    forward = inspect.unwrap(type(base.base_model).forward)  # type: ignore[union-attr]
    return ENCODE in forward.__code__.co_names


def takes_encoded(base: nn.Module) -> bool:
    """Return whether a model's forward takes encoded images beside a text."""
    return ENCODED_IMAGES in inspect.signature(base.forward).parameters


def why_not_in_source(base: nn.Module) -> str:
    """Return why an encoder-decoder's images cannot be encoded apart from the text that it encodes, or nothing.

    transformers has a function that encodes the inputs of `generate`. A class that puts encoded images into the text
    replaces that function.
    """
    if why := _why_not_encoded(base):
        return why
    name = GenerationMixin._maybe_prepare_encoder_kwargs_for_generation.__name__
    if getattr(type(base), name, None) in (None, getattr(GenerationMixin, name)):
        return f"the model's class puts no encoded images into the text that it encodes (`{name}`)"
    return ""


def _why_not_encoded(base: nn.Module) -> str:
    if not hasattr(getattr(base, "base_model", None), ENCODE):
        return f"the model's class has no image encoder that runs by itself (`{ENCODE}`)"
    if "image" not in (getattr(base, "input_modalities", None) or ()):
        return "the model's class does not say that it reads images (`input_modalities`)"
    return ""


def reads_sized_images(base: nn.Module) -> bool:
    """Return whether a model reads images in its text, and the size of a picture decides how many pieces it has."""
    return reads_images(base) and pictures_vary(base, inspect.signature(base.forward).parameters)
