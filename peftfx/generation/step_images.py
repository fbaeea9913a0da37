"""Steps of models that read images in their text. Images are encoded once, before the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from peftfx.bases.processors.token_types import TYPES, whole_types
from peftfx.errors import PeftfxError
from peftfx.generation.step import Generates, Step
from peftfx.views.images import IMAGE_FEATURES, DecodeWithImages


class GeneratesWithImages(Generates):
    """A mixin for a class that generates with the views of a model of text and images.

    Attributes:
        encode: the function that runs the view of an image.
    """

    view: DecodeWithImages
    encode: Step
    _features: Tensor | None = None
    _types: Tensor | None = None

    def encoded(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the features of each image, [pieces, width]. Each image is encoded separately."""
        first = next(iter(inputs.values()))
        ones = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(first))]
        return [self.encode(one, None)[IMAGE_FEATURES] for one in ones]

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
        """Return the logits, and the cache with these tokens and their images added."""
        given = {name: others.pop(name, None) for name, _ in self.view.images.inputs}
        pixels = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        output = (mm_encoder_outputs or {}).get("image")
        if output is not None:
            pooled = output.pooler_output
            parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
            features = torch.cat([part.flatten(0, -2) for part in parts])
        elif pixels:
            features = torch.cat(self.encoded(pixels))
        else:
            features = torch.zeros(0, self.view.images.width)
        if input_ids is not None:
            self._check(input_ids, len(features))
            if self.view.images.typed:
                before = 0 if cache is None else cache.get_seq_length()
                self._types = whole_types(self, others.pop(TYPES, None), input_ids, before)  # type: ignore[arg-type]
        self._features = features.to(self.view.images.dtype)
        try:
            return super().forward(input_ids, attention_mask, position_ids, cache, logits_to_keep, **others)
        finally:
            self._features = self._types = None

    def beside(self) -> dict[str, Tensor]:
        """Return the image features of this call, and the types of its tokens if the model reads them."""
        assert self._features is not None
        types = {} if self._types is None else {TYPES: self._types}
        return {IMAGE_FEATURES: self._features, **types}

    def _check(self, tokens: Tensor, count: int) -> None:
        wanted = int((tokens == self.view.images.token).sum())
        if wanted != count:
            what = f"the text has {wanted} image tokens, and its images {count} pieces"
            raise PeftfxError(what, "input_ids, pixel_values", "make both by the model's processor")

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Encode images once, before the prefill."""
        given = {name: model_kwargs.pop(name, None) for name, _ in self.view.images.inputs}
        pixels = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        model_kwargs.setdefault("mm_encoder_outputs", {})
        if pixels:
            # a list with one entry for each image, as beams and samples repeat the images of a text together
            output = BaseModelOutputWithPooling(pooler_output=self.encoded(pixels))  # type: ignore[call-arg, arg-type]
            model_kwargs["mm_encoder_outputs"]["image"] = output
        return model_kwargs
