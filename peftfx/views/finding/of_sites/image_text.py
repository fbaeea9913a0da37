"""The views in which sites of a model of text and images are found, if its forward's example does not run all of it.

    input_ids, attention_mask, position_ids, pixel_values, ... -> the outputs of the forward

The call has one text with one image of a fixed size, and one sound if the model reads sounds too. Nothing is served by
these views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.image_tokens import tokens_of
from peftfx.bases.processors.token_types import MODALITIES, TYPES
from peftfx.graph.capturing.known_values import known_values
from peftfx.views.decode import positions
from peftfx.views.entry import POSITIONS
from peftfx.views.images.encoded import Images, output_of_text, with_known
from peftfx.views.sounds.encoded import SOUND_LENGTH, SOUNDS, Sounds
from peftfx.views.sounds.views import SoundEncoder
from peftfx.views.view import Axes, WithoutPast

IMAGE_TEXT = "image-text"


@dataclass(frozen=True)
class ImageText(WithoutPast):
    """A forward call with an image, whose fixed values are constants.

    Attributes:
        images: how the model reads images.
    """

    images: Images
    name = IMAGE_TEXT
    trials: ClassVar[tuple[Mapping[str, int], ...]] = ({},)

    @property
    def axes(self) -> Axes:
        """The names of the axes: none, so that all sizes are those of the example."""
        return {}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return a text with one random image."""
        made = self.example(base, seed)
        fixed = {value.name for value in self.images.fixed} | {MODALITIES}
        found = {name: value for name, value in made.items() if name not in fixed}
        if self.images.sections:
            own = positions(found["attention_mask"])
            found[POSITIONS] = own.expand(self.images.sections, *own.shape).contiguous()
        return found

    def example(self, base: nn.Module, seed: int) -> dict[str, Tensor]:
        """Return a call of the forward."""
        return example_inputs(base, sizes={"batch": 1}, seed=seed)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model's forward."""
        with with_known(self.images, inputs) as (given, _):
            return output_of_text(base(**given))


@dataclass(frozen=True)
class ImageAndSoundText(ImageText):
    """A forward call with an image, whose fixed values are constants, and with a whole sound.

    Attributes:
        sounds: how the model reads sounds.
        pieces: how many pieces the sound has.
    """

    sounds: Sounds
    pieces: int

    def example(self, base: nn.Module, seed: int) -> dict[str, Tensor]:
        """Return a call of the forward, without the masks of its sound."""
        made = super().example(base, seed)
        with unset_fake_temporarily():
            ids = torch.full((1, self.pieces), self.sounds.token)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), TYPES: torch.zeros_like(ids)}
            for name in more.keys() & made.keys():
                made[name] = torch.cat((made[name], more[name]), 1)
            heard = _sound(base, self.sounds, seed)
            return {**made, self.sounds.recording: heard[self.sounds.recording]}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model's forward. Which frames of the sound count is known."""
        with _disable_current_modes():
            whole = torch.ones(1, self.sounds.lengths[-1], dtype=self.sounds.flags)
            masks = {name: whole.clone() for name in self.sounds.masks}
        with known_values(masks.values()):
            return super().__call__(base, {**inputs, **masks})


def image_text(base: nn.Module, images: Images, sounds: Sounds | None) -> ImageText:
    """Return the view in which all of a model's sites are found.

    Args:
        base: the model.
        images: how it reads images.
        sounds: how it reads sounds in the same text; None if it does not.
    """
    if sounds is None:
        return ImageText(images)
    return ImageAndSoundText(images, sounds, tokens_of(base, _sound(base, sounds, 0)) or 0)


def _sound(base: nn.Module, sounds: Sounds, seed: int) -> dict[str, Tensor]:
    return SoundEncoder(sounds).inputs(base, sizes={SOUNDS: 1, SOUND_LENGTH: sounds.lengths[-1]}, seed=seed)
