"""Examples of videos beside a text: what a model's own video processor makes of frames, or plain frames.

Videos are taken only where they are asked for: an export with them has a graph more.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.bases.config_fields import first_of, number_of
from peftfx.bases.processors.image_size import Size, processor_file
from peftfx.bases.processors.pictures import seeing
from peftfx.bases.processors.readers import takes_encoded
from peftfx.bases.processors.series import VIDEO_VALUES

ENCODE_VIDEO = "get_video_features"  #: the method of transformers' models that encodes videos
VIDEO_TOKENS = ("video_token_id", "video_token_index")  #: the fields of a config that name the token of a video's piece

_taken: ContextVar[bool] = ContextVar("taken", default=False)


@contextmanager
def with_videos(taken: bool) -> Iterator[None]:
    """Let views take videos inside the context, or leave them out."""
    token = _taken.set(taken)
    try:
        yield
    finally:
        _taken.reset(token)


def takes_videos() -> bool:
    """Return whether views take videos beside a text."""
    return _taken.get()


def why_no_videos(base: nn.Module) -> str:
    """Return why a model's videos cannot be encoded apart from its text, or nothing if they can."""
    if not hasattr(getattr(base, "base_model", None), ENCODE_VIDEO):
        return f"the model's class has no video encoder that runs by itself (`{ENCODE_VIDEO}`)"
    if "video" not in (getattr(base, "input_modalities", None) or ()):
        return "the model's class does not say that it reads videos (`input_modalities`)"
    if not takes_encoded(base) or VIDEO_VALUES not in inspect.signature(base.forward).parameters:
        return "the model's code takes no encoded videos beside a text"
    return ""


def video_of(base: nn.Module, frames: int, size: Size, seed: int = 0) -> dict[str, Tensor]:
    """Return the arguments of one random video.

    Args:
        base: the model. Its video processor is looked for where it was loaded from.
        frames: how many frames the video has.
        size: the height and width of a frame.
        seed: the seed of the random frames.
    """
    random = torch.Generator().manual_seed(seed)
    file = processor_file(base)
    with _disable_current_modes(), torch.device("cpu"):
        if file is not None and (processor := _processor(file.parent, file.stat().st_mtime_ns)) is not None:
            video = torch.randint(256, (frames, 3, *size), generator=random, dtype=torch.uint8)
            made = _made(processor, video)
            if VIDEO_VALUES in made:
                return made
        part = seeing(base.config)
        channels, own = number_of(part, "num_channels", 3), first_of(part, "image_size")
        size = size if own is None else tuple(own) if isinstance(own, list | tuple) else (own, own)
        return {VIDEO_VALUES: torch.randn(1, frames, channels, *size, generator=random)}


def _made(processor: Any, video: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a processor makes of a video, all of whose frames are taken; nothing if it takes none."""
    try:
        made: Mapping[str, object] = processor(videos=[video], return_tensors="pt", do_sample_frames=False)
    except Exception:  # whatever a processor raises for a video that it does not take
        return {}
    return {name: value for name, value in made.items() if isinstance(value, Tensor) and value.ndim}


@functools.lru_cache(8)
def _processor(home: Path, changed: int) -> Any:
    """Load the processor of videos in a directory; None if there is none. It is loaded anew if it changed."""
    from transformers import AutoVideoProcessor

    try:
        return AutoVideoProcessor.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    except Exception:  # a broken file, or a package that is not installed: plain frames are taken then
        return None
