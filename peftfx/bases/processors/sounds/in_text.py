"""Sounds that a model writes into its text: what its own code takes for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.sounds.in_forward import SOUND_TOKENS, heard_and_seen, needed_for_sounds, sound_encoder
from peftfx.bases.processors.sounds.own_extractor import extracted
from peftfx.bases.processors.sounds.recordings import RECORDINGS, fitted_shape, recording_shape

#: Lengths in tokens, where the config tells no number of frames. The last is half a minute.
_TOKENS = (7, 50, 375)


def sounds_in_text(model: nn.Module, accepted: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Yield what may be the arguments of one sound that the model writes into its text: a recording, and masks of ones.

    A recording is NaN. It has the length that the config tells, as most processors fill up each sound to it. If the
    config tells none, several lengths are tried, and whether the frames are the first axis or the second. Where texts
    may have images too, the model's own feature extractor is asked first, and then masks may be booleans.

    Args:
        model: the model; its weights are not read.
        accepted: the names of the arguments of its forward.

    Yields:
        The tensors, with a first axis for sounds; nothing if the model writes no sounds into its text, or takes more
        than a recording and masks for one.
    """
    encode = sound_encoder(model)
    if encode is None or "input_ids" not in accepted or not isinstance(first_of(model.config, *SOUND_TOKENS), int):
        return
    taken = inspect.signature(encode).parameters
    name = next((name for name in RECORDINGS if name in taken and name in accepted), None)
    masks = [other for other in taken if other in accepted and other.endswith("mask")]
    if name is None or not {*needed_for_sounds(model)} <= {name, *masks}:
        return
    both = heard_and_seen(model)
    if both and (own := extracted(model, {name, *masks})) is not None:
        yield own
    for tokens in _TOKENS:
        shape = recording_shape(model.config, name, tokens)
        if shape is None:
            return
        longer = recording_shape(model.config, name, tokens + 1)
        length = next((size for size, other in zip(shape, longer or shape, strict=True) if size != other), shape[-1])
        ones = {mask: torch.ones(1, length, dtype=torch.long) for mask in masks}
        for fitted in dict.fromkeys((fitted_shape(model, name, shape, _with(encode, ones)), shape[::-1])):
            for kind in (torch.bool, torch.long) if both and masks else (torch.long,):
                as_kind = {mask: value.to(kind) for mask, value in ones.items()}
                yield {name: torch.full((1, *fitted), torch.nan), **as_kind}


def _with(encode: Callable[..., Any], masks: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return the function that encodes recordings without padding."""

    def encoded(**given: Tensor) -> object:
        (recordings,) = given.values()
        return encode(**given, **{name: mask.expand(len(recordings), -1) for name, mask in masks.items()})

    return encoded
