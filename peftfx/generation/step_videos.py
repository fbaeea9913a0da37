"""Steps of models that read images and videos in their text. Both are encoded once, before the text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from peftfx.bases.processors.readers import ENCODED_IMAGES
from peftfx.generation.of_thread import OfThread
from peftfx.generation.step import Step
from peftfx.generation.step_images import GeneratesWithImages
from peftfx.views.images.video_views import DecodeWithVideos
from peftfx.views.images.videos import VIDEO, Videos

_SECONDS = "second_per_grid"  #: how arguments are named that say how long a slice of a video lasts


class GeneratesWithVideos(GeneratesWithImages):
    """A mixin for a class that generates with the views of a model of text, images and videos.

    Attributes:
        encode_video: the function that runs the view of a video, or of a slice of one.
    """

    view: DecodeWithVideos
    encode_video: Step
    _clips = OfThread()

    @property
    def videos(self) -> Videos:
        """How the model reads videos."""
        return self.view.videos

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits, and the cache with these tokens, their images and their videos added."""
        given, videos = self.images_in(others, self.videos), self.videos
        before = 0 if cache is None else cache.get_seq_length()
        encoded = (mm_encoder_outputs or {}).get(VIDEO)
        features = self.features_of(videos, given, encoded, self.encoded_videos, input_ids, position_ids, before)
        for name in self.of_positions if position_ids is not None else ():
            others.pop(name, None)
        self._clips = features
        try:
            return super().forward(
                input_ids, attention_mask, position_ids, cache, logits_to_keep, mm_encoder_outputs, **others
            )
        finally:
            self._clips = None

    def beside(self) -> dict[str, Tensor]:
        """Return the features of this call's images and videos."""
        assert self._clips is not None
        return {**super().beside(), self.videos.written.name: self._clips}

    def encoded_videos(self, inputs: Mapping[str, Tensor], tokens: Tensor | None) -> list[Tensor]:
        """Return the features of each video, [pieces, width].

        Args:
            inputs: all arguments of the videos, those that are fixed in the graph too.
            tokens: the text, [batch, sequence].
        """
        units = self.videos.units(inputs)
        made = iter(self.each_encoded(self.encode_video, self.videos, [one for own in units for one in own], tokens))
        return [torch.cat([next(made) for _ in own]) for own in units]

    @property
    def of_positions(self) -> tuple[str, ...]:
        """The names of the arguments from which the class computes positions alone."""
        counts = getattr(getattr(self, "model", None), "get_rope_index", None)
        taken = () if counts is None else inspect.signature(counts).parameters
        return tuple(name for name in taken if name.startswith(_SECONDS))

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *rest: object
    ) -> dict[str, Any]:
        """Encode images and videos once, before the prefill."""
        made = super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *rest)
        if given := self.images_in(made, self.videos):
            found = self.encoded_videos(given, inputs_tensor)
            made[ENCODED_IMAGES][VIDEO] = BaseModelOutputWithPooling(pooler_output=found)  # type: ignore[arg-type]
        return made
