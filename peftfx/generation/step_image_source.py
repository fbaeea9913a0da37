"""Steps of an encoder-decoder that reads images in the text that it encodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from peftfx.generation.step_encoder_decoder import GeneratesFromSource
from peftfx.generation.step_images import EncodesImages


class GeneratesFromImages(EncodesImages, GeneratesFromSource):
    """A mixin for a class that generates with the views of an encoder-decoder of text with images."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> Seq2SeqLMOutput:
        """Return the logits of the decoder's tokens, and the caches with these tokens added."""
        pixels = self.images_in(others)
        if others.get("encoder_outputs") is None and input_ids is not None:
            rows = others.get("adapter_ids")
            others["encoder_outputs"] = self._encoded_text(input_ids, attention_mask, pixels, rows)
        return super().forward(input_ids, attention_mask, **others)

    def _encoded_text(
        self, tokens: Tensor, mask: Tensor | None, pixels: dict[str, Tensor], rows: Tensor | None
    ) -> BaseModelOutput:
        found = self.encoded(pixels, tokens) if pixels else [torch.zeros(0, self.images.width)]
        features = torch.cat(found).to(self.images.dtype)
        self.check_count(tokens, len(features))
        return self.source_encoder(tokens, mask, rows, features)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Encode the images and the text once, before the decoder begins."""
        pixels = self.images_in(model_kwargs)
        if model_kwargs.get("encoder_outputs") is None:
            mask, rows = model_kwargs.get("attention_mask"), model_kwargs.get("adapter_ids")
            model_kwargs["encoder_outputs"] = self._encoded_text(inputs_tensor, mask, pixels, rows)
        return model_kwargs
