"""The view that encodes sounds, and the decode view that reads encoded sounds in its text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.views.capturing.written_tokens import no_places_without_features
from peftfx.views.sounds.encoded import (
    AUDIO,
    AUDIO_FEATURES,
    SOUND_LENGTH,
    SOUNDS,
    Sounds,
    embedded_with,
    encode_sounds,
    encoded_already,
    written_where_handed_on,
)
from peftfx.views.view import Axes, WithoutPast
from peftfx.views.written_features import DecodeWithFeatures, WrittenFeatures


@dataclass(frozen=True)
class SoundEncoder(WithoutPast):
    """The view that runs once for the sounds of a call: it computes the features of all pieces, as wide as text."""

    sounds: Sounds
    name = AUDIO

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Numbers of sounds, of several lengths if the model takes these."""
        lengths = self.sounds.lengths if self.sounds.along else ()
        return tuple(
            {SOUNDS: count, **({SOUND_LENGTH: lengths[i % len(lengths)]} if lengths else {})}
            for i, count in enumerate((1, 3, 2))
        )

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        length = SOUND_LENGTH if self.sounds.along else None
        recording = (SOUNDS, *(length if size is None else None for size in self.sounds.shape))
        return {self.sounds.recording: recording, **dict.fromkeys(self.sounds.masks, (SOUNDS, length))}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return random recordings. Of several, the last is a quarter shorter, if there are masks to tell so."""
        wanted = {SOUNDS: 2, SOUND_LENGTH: self.sounds.lengths[0], **(sizes or {})}
        count, length = wanted[SOUNDS], wanted[SOUND_LENGTH]
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            shape = [length if size is None else size for size in self.sounds.shape]
            made = {self.sounds.recording: torch.randn(count, *shape, generator=random).to(self.sounds.heard)}
            for name in self.sounds.masks:
                made[name] = torch.ones(count, length, dtype=self.sounds.flags)
                if count > 1:
                    made[name][-1, length - length // 4 :] = 0
            return made

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the sound encoder, and the layers that make its features as wide as the text's."""
        return {AUDIO_FEATURES: encode_sounds(base, inputs)}


@dataclass(frozen=True)
class DecodeWithSounds(DecodeWithFeatures):
    """The decode view of a model that reads sounds in its text.

    Attributes:
        sounds: how the model reads sounds.
    """

    sounds: Sounds

    @property
    def written(self) -> WrittenFeatures:
        """The features of sounds."""
        return self.sounds.written

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view.

        transformers' forwards take no encoded sounds. So the function that encodes sounds returns the features, and the
        recording, which makes the forward call that function, is a zero. A forward that encodes sounds itself gets
        embedded text with the features in it; one that can write images too hands that on to its text model.
        """
        given = dict(inputs)
        features = given.pop(AUDIO_FEATURES)
        assert isinstance(features, Tensor)
        exporting = torch.compiler.is_exporting()
        if not exporting and not len(features):  # a step of text, as in the model's own `generate`
            return super().__call__(base, given)
        if self.sounds.handed:
            ids = given["input_ids"]
            assert isinstance(ids, Tensor)
            with written_where_handed_on(base, ids, self.sounds.token, features):
                return super().__call__(base, given)
        if self.sounds.embedded:
            ids = given.pop("input_ids")
            assert isinstance(ids, Tensor)
            given["inputs_embeds"] = embedded_with(base, ids, self.sounds.token, features)
            return super().__call__(base, given)
        given[self.sounds.recording] = torch.zeros(1, dtype=features.dtype, device=features.device)
        held = no_places_without_features({self.sounds.token: features}) if exporting else nullcontext()
        with encoded_already(base, features), held:
            return super().__call__(base, given)
