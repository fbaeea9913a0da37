"""The shapes of example recordings, from a model's config."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import nn

from peftfx.bases.config_fields import first_of

RECORDINGS = ("input_features", "input_values")  #: the names of inputs that are sound
_PARTS = ("audio_config", "speech_config", "encoder_config", "encoder")
#: Raw samples of a token, where the config does not give the strides: 25 ms at 16 kHz.
_SAMPLES = 400


def recording_name(model: nn.Module, accepted: Collection[str]) -> str | None:
    """Return the argument in which a model takes a recording; None if its main input is something else.

    A model that joins an encoder and a decoder of any types takes what its encoder takes.

    Args:
        model: a transformers model.
        accepted: the names of the arguments of its forward.
    """
    name = getattr(model, "main_input_name", None)
    if name not in accepted or name == "inputs":
        name = getattr(getattr(model, "encoder", None), "main_input_name", None)
    return name if name in RECORDINGS and name in accepted else None


def recording_shape(config: object, name: str, tokens: int) -> tuple[int, ...] | None:
    """Return the shape of one recording: mel bins by frames, frames by features, or raw samples. None if unknown.

    Args:
        config: the model's config. Fields that it lacks are read from the config of the part that hears.
        name: the argument that takes the recording.
        tokens: a length in tokens. It counts only if the config leaves the length open.
    """
    heard = first_of(config, *_PARTS)

    def field(*names: str) -> object:
        value = first_of(config, *names)
        return first_of(heard, *names) if value is None else value

    mels, frames = field("num_mel_bins"), field("max_source_positions", "max_length")
    if name == "input_features" and isinstance(mels, int) and isinstance(frames, int):
        return mels, 2 * frames
    features = field("input_feat_per_channel", "feature_projection_input_dim")
    features = mels if features is None else features
    if name == "input_features" and isinstance(features, int):
        return 8 * tokens, features
    strides = field("conv_stride")
    if isinstance(strides, list | tuple):
        return (math.prod(strides) * (tokens + 9),)
    if isinstance(mels, int) and isinstance(frames, int):
        return frames, mels
    return (_SAMPLES * (tokens + 9),) if name == "input_values" else None
