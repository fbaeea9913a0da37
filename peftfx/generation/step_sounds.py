"""Steps of models that read sounds in their text. Sounds are encoded once, before the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftfx.errors import PeftfxError
from peftfx.generation.of_thread import OfThread
from peftfx.generation.step import Generates, Step
from peftfx.generation.step_images import GeneratesWithImages
from peftfx.generation.step_videos import GeneratesWithVideos
from peftfx.views.sounds.encoded import AUDIO_FEATURES, Sounds


class GeneratesWithSounds(Generates):
    """A mixin for a class that generates with the views of a model of text and sounds.

    Before a mixin for images, it adds sounds to the images of a text.

    Attributes:
        encode_sounds: the function that runs the view of sounds.
    """

    encode_sounds: Step
    _heard = OfThread()

    @property
    def sounds(self) -> Sounds:
        """How the model reads sounds."""
        view: Any = self.view
        sounds: Sounds = view.sounds
        return sounds

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits, and the cache with these tokens and their sounds added."""
        given = {name: others.pop(name, None) for name in self.sounds.names}
        heard = {name: value for name, value in given.items() if value is not None}
        before = 0 if cache is None else cache.get_seq_length()
        if before and self.sounds.recording not in heard:
            heard = {}  # `generate` of some classes hands masks on to every step
        features = self.encoded_sounds(heard)
        if input_ids is not None:
            wanted = int((input_ids == self.sounds.token).sum())
            if wanted != len(features) and (len(features) or not before):  # later, such a token is text
                what = f"the text has {wanted} tokens of sounds, and its sounds {len(features)} pieces"
                where = ", ".join(("input_ids", *self.sounds.names))
                raise PeftfxError(what, where, "make all of them by the model's processor")
        self._heard = features
        try:
            return super().forward(input_ids, attention_mask, position_ids, cache, logits_to_keep, **others)
        finally:
            self._heard = None

    def encoded_sounds(self, heard: dict[str, Tensor]) -> Tensor:
        """Return the features of all sounds of a call, [pieces, width]; none for a call without sounds.

        Args:
            heard: the recordings and their masks, by the names of the forward's arguments.
        """
        sounds = self.sounds
        if sounds.recording not in heard:
            if heard:
                raise PeftfxError("there are masks of sounds, and no sounds", ", ".join(heard), "pass the sounds too")
            return torch.zeros(0, sounds.width, dtype=sounds.dtype)
        recordings = heard[sounds.recording]
        inputs = {sounds.recording: recordings, **{name: heard[name] for name in sounds.masks if name in heard}}
        missing = [name for name in sounds.masks if name not in inputs]
        if missing:
            what = "the graph of sounds needs to know how long each sound is"
            raise PeftfxError(what, ", ".join(missing), "pass what the model's processor makes")
        found = self.encode_sounds(inputs, None)[AUDIO_FEATURES]
        return (
            found if sounds.picks not in heard else _picked(found, heard[sounds.picks], len(recordings), sounds.picks)
        )

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *rest: object
    ) -> dict[str, Any]:
        """Leave images as they are where no graph takes them: a step then refuses them."""
        if not isinstance(self, GeneratesWithImages):
            return model_kwargs
        made: dict[str, Any] = super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs, *rest
        )
        return made

    def beside(self) -> dict[str, Tensor]:
        """Return the features of this call's sounds."""
        assert self._heard is not None
        return {**super().beside(), AUDIO_FEATURES: self._heard.to(self.sounds.dtype)}


class GeneratesWithImagesAndSounds(GeneratesWithSounds, GeneratesWithImages):  # type: ignore[misc]
    """A mixin for a class that generates with the views of a model of text, images and sounds."""


class GeneratesWithVideosAndSounds(GeneratesWithSounds, GeneratesWithVideos):  # type: ignore[misc]
    """A mixin for a class that generates with the views of a model of text, images, videos and sounds."""


def _picked(features: Tensor, counts: Tensor, sounds: int, name: str) -> Tensor:
    """Return those pieces of each sound that count."""
    each = len(features) // sounds
    if counts.shape != (sounds, each):
        what = f"each of the {sounds} sounds has {each} pieces, and this says of {list(counts.shape)} which ones count"
        raise PeftfxError(what, name, "pass what the model's processor makes")
    return features[counts.flatten().bool()]
