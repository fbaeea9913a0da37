"""The decode views of models that read images and sounds in one text, with videos or without.

decode:  the inputs for a text, image_features, video_features, audio_features -> logits, present.N.key/value
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftfx.views.images.video_views import DecodeWithVideos
from peftfx.views.images.views import DecodeWithImages
from peftfx.views.sounds.encoded import AUDIO_FEATURES, Sounds, written_where_handed_on
from peftfx.views.written_features import DecodeWithFeatures, WrittenFeatures


class Hears(DecodeWithFeatures):
    """A mixin, before a decode view with images, for a model that reads sounds in its text too.

    Attributes:
        sounds: how the model reads sounds.
    """

    sounds: Sounds

    @property
    def more(self) -> tuple[WrittenFeatures, ...]:
        """The features of sounds too."""
        return (*super().more, self.sounds.written)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view. Sounds are in the embedded text that its code hands on."""
        given = dict(inputs)
        features, ids = given.pop(AUDIO_FEATURES), given["input_ids"]
        assert isinstance(features, Tensor)
        assert isinstance(ids, Tensor)
        if not torch.compiler.is_exporting() and not len(features):
            return super().__call__(base, given)
        with written_where_handed_on(base, ids, self.sounds.token, features):
            return super().__call__(base, given)


@dataclass(frozen=True)
class DecodeWithImagesAndSounds(Hears, DecodeWithImages):
    """The decode view of a model that reads images and sounds in its text."""

    sounds: Sounds


@dataclass(frozen=True)
class DecodeWithVideosAndSounds(Hears, DecodeWithVideos):
    """The decode view of a model that reads images, videos and sounds in its text."""

    sounds: Sounds
