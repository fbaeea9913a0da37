"""Series: the shapes of examples that are a video, which is a row of pictures, or a row of measured values."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.dtypes import floating_dtype
from peftfx.bases.processors.fake_runs import on_fakes
from peftfx.bases.processors.pictures import seeing

PIXEL_VALUES, VIDEO_VALUES = "pixel_values", "pixel_values_videos"  #: the arguments that take an image, and a video
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


def video_inputs(model: nn.Module, accepted: Collection[str], picture: Tensor) -> dict[str, Tensor] | None:
    """Return the argument that holds a video of equal pictures; None if the model reads no videos, or beside a text.

    Some models whose config counts frames take the frames one by one, so the model's code is run to see what it takes.

    Args:
        model: the model; its weights are not read.
        accepted: the arguments of its forward.
        picture: one picture, [1, channels, height, width].
    """
    frames = first_of(seeing(model.config), "num_frames", "frames_per_clip")
    video = picture[:, None].repeat(1, frames if isinstance(frames, int) else 2, 1, 1, 1)
    if PIXEL_VALUES not in accepted:
        return {VIDEO_VALUES: video} if VIDEO_VALUES in accepted else None
    if not isinstance(frames, int) or "input_ids" in accepted:
        return None
    known = _reads.setdefault(model, {})
    shape = tuple(video.shape)
    if shape not in known:
        known[shape] = _runs(model, shape)
    return {PIXEL_VALUES: video} if known[shape] else None


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    dtype = floating_dtype(model)
    with on_fakes(model):
        try:
            model(pixel_values=torch.zeros(shape, dtype=dtype))
        except Exception:  # whatever a model's code raises for pixels that it does not take
            return False
    return True
