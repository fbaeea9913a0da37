"""Encoded sounds: what the views know of a model's sounds, and how its own code encodes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.processors.sounds.in_forward import ENCODE_SOUND, sound_encoder
from peftfx.views.written_features import WrittenFeatures

AUDIO_FEATURES, AUDIO_TOKENS = "audio_features", "audio_tokens"
AUDIO = "audio"
EMBEDDED = "inputs_embeds"
SOUNDS, SOUND_LENGTH = "sounds", "sound_length"  #: the axes of recordings and their masks


@dataclass(frozen=True)
class Sounds:
    """What both views know of the model's sounds.

    Attributes:
        token: the id that stands for a piece of a sound in the text.
        width: the features of a piece.
        dtype: the dtype of the features.
        heard: the dtype of recordings.
        recording: the argument that takes recordings.
        shape: the shape of one recording; None along it, if it may have any length.
        masks: the arguments of the encoder that say how long each recording is: [sounds, length].
        lengths: lengths of an example's recordings; several only if they may have any.
        picks: the argument of the forward alone that says which pieces of each sound count, [sounds, pieces]; empty if
            there is none.
        embedded: whether the forward takes features only within embedded text, as no method of its encodes sounds.
        handed: whether features are written into the embedded text that the forward hands on to its text model, as the
            text may have images too.
        flags: the dtype of masks.
    """

    token: int
    width: int
    dtype: torch.dtype
    heard: torch.dtype
    recording: str
    shape: tuple[int | None, ...]
    masks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    picks: str = ""
    embedded: bool = False
    handed: bool = False
    flags: torch.dtype = torch.long

    @property
    def written(self) -> WrittenFeatures:
        """What a graph of the text takes in place of sounds."""
        return WrittenFeatures(AUDIO_FEATURES, AUDIO_TOKENS, self.token, self.width, self.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all arguments of a forward that are of sounds."""
        return (self.recording, *self.masks, *([self.picks] if self.picks else ()))

    @property
    def along(self) -> int:
        """The axis of a call's recordings along which they may have any length; 0 if they have one length."""
        return 1 + self.shape.index(None) if None in self.shape else 0


def picking(accepted: Collection[str], taken: Collection[str], recording: str) -> str:
    """Return the argument of a forward that says which pieces of encoded sounds count; nothing without one.

    A mask of recordings that only the forward takes is of their pieces.

    Args:
        accepted: the names of the arguments of the forward.
        taken: the names of the arguments of the function that encodes sounds.
        recording: the argument that takes recordings.
    """
    name = f"{recording}_mask"
    return name if name in accepted and name not in taken else ""


def encode_sounds(base: nn.Module, inputs: Mapping[str, object]) -> Tensor:
    """Return the features of all sounds of a call, [pieces, width], computed by the model's own code."""
    encode = sound_encoder(base)
    assert encode is not None
    features = encode(**inputs, return_dict=True).pooler_output
    assert isinstance(features, Tensor)
    return features.flatten(0, -2)


@contextmanager
def encoded_already(base: nn.Module, features: Tensor) -> Iterator[list[None]]:
    """Give the model's code these features, [pieces, width], where it encodes sounds inside the context.

    Yields:
        A list that gets an entry for each time that the code encodes sounds.
    """
    own, calls = vars(base.base_model), list[None]()
    before = {ENCODE_SOUND: own[ENCODE_SOUND]} if ENCODE_SOUND in own else {}

    def encoded(*_: object, **__: object) -> BaseModelOutputWithPooling:
        calls.append(None)
        return BaseModelOutputWithPooling(pooler_output=features)

    own[ENCODE_SOUND] = encoded
    try:
        yield calls
    finally:
        del own[ENCODE_SOUND]
        own.update(before)


def embedded_with(base: nn.Module, ids: Tensor, token: int, features: Tensor) -> Tensor:
    """Return embedded text, [batch, sequence, width], with the features of sounds, in order, at their tokens.

    Args:
        base: the model.
        ids: the text, [batch, sequence].
        token: the id that stands for a piece of a sound.
        features: [pieces, width], with a row for each such token; or none, and then these tokens are text.
    """
    text = base.get_input_embeddings()(ids)  # type: ignore[operator]
    return _written_into(text, ids, token, features)


@contextmanager
def written_where_handed_on(base: nn.Module, ids: Tensor, token: int, features: Tensor) -> Iterator[None]:
    """Write features into the embedded text that a forward hands on to a part of the model, inside the context.

    Args:
        base: the model.
        ids: the text, [batch, sequence].
        token: the id that stands for a piece of a sound.
        features: [pieces, width], with a row for each such token; or none, and then these tokens are text.
    """

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        text = kwargs.get(EMBEDDED)
        return None if text is None else (args, {**kwargs, EMBEDDED: _written_into(text, ids, token, features)})

    handles = [part.register_forward_pre_hook(called, with_kwargs=True) for part in handed_to(base)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def handed_to(base: nn.Module) -> list[nn.Module]:
    """Return the parts of a model that its forward hands embedded text on to: those with the embedding of tokens.

    Parts that encode may take what they embed by the same name.
    """
    inner, tokens = base.base_model, base.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(inner, nn.Module)
    # In a capture, torch may give stand-ins for modules, which share the state of these: if one module has two names.
    return [part for part in inner.children() if any(vars(module) is vars(tokens) for module in part.modules())]


def _written_into(text: Tensor, ids: Tensor, token: int, features: Tensor) -> Tensor:
    some = torch.ones_like(features[:, 0], dtype=torch.long).sum() > 0
    return text.index_put(((ids == token) & some,), features.to(text.device, text.dtype))
