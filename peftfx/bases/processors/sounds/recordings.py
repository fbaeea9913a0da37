"""The shapes of example recordings, from a model's config, and from the first layer that reads one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.fake_runs import on_fakes

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
    if not isinstance(name, str) or name not in accepted or name == "inputs":  # some models name several
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
    features = field(
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        "input_size",
        "input_feat_size",
        "audio_embed_dim",
    )
    features = mels if features is None else features
    if name == "input_features" and isinstance(features, int):
        return 8 * tokens, features
    strides = field("conv_stride")
    if isinstance(strides, list | tuple):  # heads of speakers' vectors take 14 frames for one
        return (math.prod(strides) * (tokens + 12),)
    if isinstance(mels, int) and isinstance(frames, int):
        return frames, mels
    return (_SAMPLES * (tokens + 9),) if name == "input_values" else None


_fitted: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], tuple[int, ...]]] = WeakKeyDictionary()


def fitted_shape(
    model: nn.Module, name: str, shape: tuple[int, ...], run: Callable[..., object] | None = None
) -> tuple[int, ...]:
    """Return the shape of one recording as the first layer that reads it takes it.

    Processors of some models put frames together, so that the features are wider than the config says, or add an axis
    for channels to raw samples.

    Args:
        model: the model; its weights are not read.
        name: the argument that takes the recording.
        shape: the shape that the config tells.
        run: runs the part of the model that reads recordings, given one by its name; by default the model.
    """
    known = _fitted.setdefault(model, {})
    if shape not in known:
        known[shape] = _fitted_to(_first_layer(model, name, shape, run or model), shape)
    return known[shape]


class _Found(Exception):
    """The first layer has been called."""


def _first_layer(model: nn.Module, name: str, shape: tuple[int, ...], run: Callable[..., object]) -> nn.Module | None:
    """Return the first linear layer or conv that the model's code calls with a recording of this shape itself."""
    first: list[nn.Module] = []

    def called(module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == (2, *shape):
            first.append(module)
        raise _Found

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d)]
    with on_fakes(model):
        hooks = [layer.register_forward_pre_hook(called) for layer in layers]
        try:
            run(**{name: torch.zeros(2, *shape)})
        except Exception:  # whatever the model's code raises before
            pass
        finally:
            for hook in hooks:
                hook.remove()
    return first[0] if first else None


def _fitted_to(layer: nn.Module | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear) and len(shape) == 2:
        return shape[0], layer.in_features
    if isinstance(layer, nn.Conv1d) and len(shape) == 2 and layer.in_channels == shape[1] != shape[0]:
        return shape[::-1]  # the conv goes along the frames
    return (1, *shape) if isinstance(layer, nn.Conv1d) and len(shape) == 1 and layer.in_channels == 1 else shape
