"""How many tokens of a text stand for one image or sound, found by a run of the model's encoder on fake tensors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of, number_of
from peftfx.bases.dtypes import floating_dtype
from peftfx.bases.processors.encoded_images import by_image, main_features
from peftfx.bases.processors.fake_runs import on_fakes
from peftfx.bases.processors.readers import ENCODE
from peftfx.bases.processors.sounds.in_forward import SOUND_TOKENS, sound_encoder
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.graph.capturing.known_values import known_values

#: The fields of a config that name the token of an image's piece.
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")
_MOST = 256  #: numbers of a tensor whose values the model's code may read
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_found: WeakKeyDictionary[nn.Module, dict[tuple[_Shapes, tuple[int, ...]], int | None]] = WeakKeyDictionary()


def tokens_of(model: nn.Module, image: Mapping[str, Tensor]) -> int | None:
    """Return how many features the model's own encoder makes of an image or sound; None if it cannot be found.

    Args:
        model: the model; its weights are not read.
        image: the arguments of one image or sound, by the names of the forward's arguments.
    """
    parts = (getattr(model, "base_model", None), *model.modules())
    own = (found for part in parts if (found := getattr(part, ENCODE, None)))
    encode = sound_encoder(model) if is_sound(image) else next(own, None)
    if encode is None:
        return None
    accepted = inspect.signature(encode).parameters
    given = {name: value for name, value in image.items() if name in accepted}
    shapes = tuple((name, tuple(value.shape)) for name, value in given.items())
    numbers = () if is_sound(image) else _numbers(given)
    counts = _found.setdefault(model, {})
    if (key := (shapes, numbers)) not in counts:
        counts[key] = _count(model, encode, given) if given else None
    return counts[key]


def token_and_count(
    model: nn.Module, image: Mapping[str, Tensor] | None, told: bool, size: tuple[int, int], edge: int
) -> tuple[int | None, int]:
    """Return the token that stands for a piece of an image or sound, and the number of such tokens for one.

    Args:
        model: the model; its weights are not read.
        image: the arguments of one image or sound, if there is an example.
        told: whether a call says which tokens stand for an image, so that any token can.
        size: the height and width of an image.
        edge: the height and width of a patch.
    """
    config = model.config
    token = first_of(config, *(SOUND_TOKENS if image is not None and is_sound(image) else IMAGE_TOKEN_FIELDS))
    if not isinstance(token, int):
        if not told:
            return None, 0
        token = 0
    found = None if image is None else tokens_of(model, image)
    if found is not None:
        return token, found
    count = first_of(config, "num_query_tokens", "image_seq_length", "mm_tokens_per_image")
    if isinstance(count, int):
        return token, count
    pieces = math.prod(n // edge for n in size)
    return token, pieces // number_of(config, "downsample_factor", 1) ** 2


def in_patches(model: nn.Module, image: Mapping[str, Tensor], edge: int) -> Mapping[str, Tensor]:
    """Return an image as its encoder takes it: plain pixels, or, if it does not run on these, one row for each patch.

    Args:
        model: the model; its weights are not read.
        image: the pixels [1, channels, height, width], by the name of their argument.
        edge: the height and width of a patch.
    """
    if tokens_of(model, image) is not None:
        return image
    rows = {
        name: value.unfold(2, edge, edge).unfold(3, edge, edge).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        for name, value in image.items()
    }
    return image if tokens_of(model, rows) is None else rows


def most_in_a_text(images: int, texts: int) -> int:
    """Return how many images the text with most of them has, if they are dealt out evenly."""
    return -(-images // texts)


def image_places(texts: int, images: int, length: int, pieces: int) -> Tensor:
    """Return which tokens of texts stand for pieces of images or sounds, bool[texts, length + most * pieces].

    The first texts have an image more than others, and text in its place where the others have none. A token of text is
    between two images if there are enough.

    Args:
        texts, images: how many there are.
        length: how many tokens of a text stand for no image where it has most of them.
        pieces: how many tokens stand for an image.
    """
    most = most_in_a_text(images, texts)
    places = torch.zeros(texts, length + most * pieces, dtype=torch.bool)
    apart = pieces + (length > most + 2)
    for row in range(texts):
        for n in range(images // texts + (row < images % texts)):
            places[row, n * apart : n * apart + pieces] = True
    return places


def is_sound(image: Mapping[str, Tensor]) -> bool:
    """Return whether these are the arguments of a sound, and not of an image."""
    return any(name in image for name in RECORDINGS)


def _numbers(given: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the numbers that the model's code may read."""
    return tuple(n for value in given.values() if _readable(value) for n in value.flatten().tolist())


def _readable(value: Tensor) -> bool:
    return not value.is_floating_point() and value.numel() <= _MOST


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def split_known(image: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the arguments of an image without those whose values the model's code may read, and those."""
    known = {name: value for name, value in image.items() if _readable(value)}
    return {name: value for name, value in image.items() if name not in known}, known


def _count(model: nn.Module, encode: Callable[..., Any], given: Mapping[str, Tensor]) -> int | None:
    """Return how many features an encoder makes, run on fake tensors; None if it does not run.

    The masks of a sound say how long it is. A graph takes any, so the code must run on masks that are not known, too.
    """
    rest, known = split_known(given)
    if is_sound(given):
        known = {name: value for name, value in given.items() if not value.is_floating_point()}
        rest = {name: value for name, value in given.items() if name not in known}
    dtype = floating_dtype(model)
    with on_fakes(model) as mode:
        fed = {name: mode.from_tensor(_cast(value, dtype)) for name, value in rest.items()}
        try:
            if is_sound(given):
                encode(**fed, **{name: mode.from_tensor(value) for name, value in known.items()}, return_dict=True)
            with known_values(known.values(), fed.values()):
                output = encode(**fed, **known, return_dict=True)
            count = sum(part.shape[:-1].numel() for part in by_image(main_features(output)[1]))
        except Exception:  # whatever the model's code raises
            return None
    return count if isinstance(count, int) else None
