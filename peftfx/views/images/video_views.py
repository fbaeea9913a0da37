"""The view that encodes a video, or a slice of one, and the decode view that reads encoded videos and images.

video:   pixel_values_videos, ... -> video_features
decode:  the inputs for a text, image_features, video_features -> logits, present.N.key/value
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.dtypes import floating_dtype
from peftfx.bases.processors.pictures import told_size
from peftfx.bases.processors.videos import video_of
from peftfx.views.images.encoded import Images
from peftfx.views.images.videos import FRAMES, VIDEO, Videos
from peftfx.views.images.views import DecodeWithImages, ImageEncoder
from peftfx.views.view import Axes
from peftfx.views.written_features import WrittenFeatures

_FEW = 2  #: the frames of an example; enough for a slice of a video


@dataclass(frozen=True)
class VideoEncoder(ImageEncoder):
    """The view that runs once for a slice of a video, or for a whole one."""

    images: Videos
    name: ClassVar[str] = VIDEO

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Numbers of frames, if they are free."""
        return ({},) if self.images.counted else tuple({FRAMES: count} for count in (3, 1, 6))

    @property
    def axes(self) -> Axes:
        """The axes of the inputs: a whole video has any number of frames."""
        frames = None if self.images.counted else FRAMES
        free = {name: (None, frames, *[None] * (len(shape) - 2)) for name, shape in self.images.inputs}
        return super().axes if self.images.counted else free

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return a random slice, or a random video."""
        size, frames = told_size(base), (sizes or {}).get(FRAMES, _FEW)
        assert size is not None  # the view was found with it
        with unset_fake_temporarily():
            made = video_of(base, frames, size, seed)
            dtype = floating_dtype(base)
            own = {n: v.to(dtype) if v.is_floating_point() else v for n, v in made.items()}
            return {
                name: own[name][: shape[0]] if self.images.counted else own[name] for name, shape in self.images.inputs
            }


@dataclass(frozen=True)
class DecodeWithVideos(DecodeWithImages):
    """The decode view of a model that reads images and videos in its text.

    Attributes:
        videos: how the model reads videos.
    """

    videos: Videos

    @property
    def more(self) -> tuple[WrittenFeatures, ...]:
        """The features of videos."""
        return (self.videos.written, *super().more)

    def _taken(self, given: dict[str, object]) -> list[tuple[Images, Tensor]]:
        features = given.pop(self.videos.written.name)
        assert isinstance(features, Tensor)
        return [*super()._taken(given), (self.videos, features)]
