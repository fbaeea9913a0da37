"""Steps of models that read images and videos in their text. Both are encoded once, before the text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from peftfx.bases.processors.encoded_images import joined_features
from peftfx.bases.processors.readers import ENCODED_IMAGES
from peftfx.errors import PeftfxError
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
        given, videos = self._videos_in(others), self.videos
        if given and self.view.images.sections and position_ids is None:
            what, hint = "a call with videos needs the positions of its tokens", "use generate, or pass position_ids"
            raise PeftfxError(what, "position_ids", hint)
        output = (mm_encoder_outputs or {}).get(VIDEO)
        if output is not None:
            features = joined_features(output)
        elif given:
            features = torch.cat(self.encoded_videos(given, input_ids))
        else:
            features = torch.zeros(0, videos.width)
        before = 0 if cache is None else cache.get_seq_length()
        if input_ids is not None and (len(features) or not before):
            wanted = int((input_ids == videos.token).sum())
            if wanted != len(features):
                what = f"the text has {wanted} video tokens, and its videos {len(features)} pieces"
                where = f"input_ids, {videos.inputs[0][0]}"
                raise PeftfxError(what, where, "make both by the model's processor")
        for name in self.of_positions if position_ids is not None else ():
            others.pop(name, None)
        self._clips = features.to(videos.dtype)
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

    def _videos_in(self, named: dict[str, Any]) -> dict[str, Tensor]:
        """Take the arguments of videos out of the arguments of a call; nothing if it has no pixels."""
        given = {name: named.pop(name, None) for name in self.videos.names}
        first = given[self.videos.inputs[0][0]]
        return {n: v for n, v in given.items() if isinstance(v, Tensor)} if isinstance(first, Tensor) else {}

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
        if given := self._videos_in(made):
            found = self.encoded_videos(given, inputs_tensor)
            made[ENCODED_IMAGES][VIDEO] = BaseModelOutputWithPooling(pooler_output=found)  # type: ignore[call-arg, arg-type]
        return made
