"""Series: the shapes of examples that are a video, which is a row of pictures, or a row of measured values."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.dtypes import floating_dtype
from peftfx.bases.processors.fake_runs import on_fakes

PAST_VALUES = "past_values"  #: the argument that takes a time series, [batch, time, channels]


def series_shape(config: object, accepted: Collection[str]) -> tuple[int, int] | None:
    """Return the length and the channels of a time series, as a model's config tells; None for other models.

    Args:
        config: the model's config.
        accepted: the arguments of its forward.
    """
    length, channels = first_of(config, "context_length"), first_of(config, "num_input_channels")
    if PAST_VALUES not in accepted or not isinstance(length, int) or not isinstance(channels, int):
        return None
    return length, channels


_reads: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], bool]] = WeakKeyDictionary()


def as_video(model: nn.Module, accepted: Collection[str], pixels: Tensor) -> Tensor:
    """Return the pixels of a video of equal pictures, if the model reads videos and no texts; else those given.

    Some models whose config counts frames take the frames one by one, so the model's code is run to see what it takes.

    Args:
        model: the model; its weights are not read.
        accepted: the arguments of its forward.
        pixels: one picture, [1, channels, height, width].
    """
    frames = first_of(model.config, "num_frames")
    if not isinstance(frames, int) or "input_ids" in accepted:
        return pixels
    video = pixels[:, None].repeat(1, frames, 1, 1, 1)
    known = _reads.setdefault(model, {})
    shape = tuple(video.shape)
    if shape not in known:
        known[shape] = _runs(model, shape)
    return video if known[shape] else pixels


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    dtype = floating_dtype(model)
    with on_fakes(model):
        try:
            model(pixel_values=torch.zeros(shape, dtype=dtype))
        except Exception:  # whatever a model's code raises for pixels that it does not take
            return False
    return True
