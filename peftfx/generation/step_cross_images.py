"""Steps of a decoder whose layers attend to an image beside its text. The image is encoded once, before the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftfx.bases.processors.beside_text import CROSS_MASK
from peftfx.caches.cache import cache_of, held
from peftfx.caches.held import kept_by
from peftfx.errors import PeftfxError
from peftfx.generation.step import Generates
from peftfx.generation.step_images import EncodesImages, split_images
from peftfx.views.finding.cross_images import DecodeOverImages
from peftfx.views.images.encoded import Images


class GeneratesOverImages(EncodesImages, Generates):
    """A mixin for a class that generates with the views of a decoder that attends to images."""

    view: DecodeOverImages
    _shown: Tensor | None = None

    @property
    def images(self) -> Images:  # type: ignore[override]
        """How the model reads images."""
        return self.view.cross.images

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        logits_to_keep: int | Tensor = 0,
        cross_attention_mask: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits, and the cache with these tokens added. The image comes with the first tokens."""
        pixels = self.images_in(others)
        if others.pop("use_cache", None) is False or cache is None:
            cache = self.new_cache()
        if input_ids is not None:
            before = cache.get_seq_length()
            if not before:
                self._begin(cache, pixels, input_ids)
            elif pixels:
                hint = "begin a new text, or run the model by transformers"
                raise PeftfxError("an image comes with the first tokens of a text", self.images.inputs[0][0], hint)
            self._shown = self._mask(cross_attention_mask, input_ids, cache, before)
        try:
            return super().forward(input_ids, attention_mask, position_ids, cache, logits_to_keep, **others)
        finally:
            self._shown = None

    def beside(self) -> dict[str, Tensor]:
        """Return which tokens of this call attend to which pieces of their images."""
        assert self._shown is not None
        return {CROSS_MASK: self._shown}

    def stepped(self, inputs: dict[str, Tensor], cache: Cache) -> Mapping[str, Tensor]:
        """Return the outputs of the view, with the keys and values of images, which stay."""
        return self.view.with_images(self.step(inputs, cache), inputs)

    def _begin(self, cache: DynamicCache, pixels: dict[str, Tensor], tokens: Tensor) -> None:
        """Put the keys and values of images into an empty cache: zeros for a text without one."""
        kept = kept_by(self.view.layers)
        past = [tensor.empty(len(tokens), tokens.device) for tensor in kept]
        ones = split_images(self.images, pixels) if pixels else []
        if pixels and len(ones) != len(tokens):
            what = f"the graphs take one image for each text, and this call has {len(ones)} for {len(tokens)}"
            raise PeftfxError(what, self.images.inputs[0][0], "run the model by transformers")
        found = [self.encode(one, None) for one in ones]
        for i in self.view.of_images if found else ():
            past[i] = torch.cat([each[self.view.present_names[i]] for each in found]).to(kept[i].dtype)
        cache_of(self.view.layers, past, cache)

    def _mask(self, given: Tensor | None, tokens: Tensor, cache: DynamicCache, before: int) -> Tensor:
        """Return which tokens attend to which pieces: none in a text without an image. One token needs no mask."""
        shape = (*tokens.shape, *self.view.cross.shown)
        has = held(cache)[self.view.of_images[0]][:, :, :1].flatten(1).any(1).long()
        if given is None and shape[1] > 1 and bool(has.any()):
            hint = "pass what the model's processor makes"
            raise PeftfxError("a text with an image needs the mask of its image's pieces", CROSS_MASK, hint)
        if given is None:
            given = torch.ones(shape, dtype=torch.long, device=tokens.device)
        elif given.shape[1] != shape[1]:
            given = given[:, before : before + shape[1]]
        if given.shape != shape:
            what = f"the graph takes a mask {list(shape)}, and this call has {list(given.shape)}"
            raise PeftfxError(what, CROSS_MASK, "give one image for each text, and pass what the processor makes")
        return (given == 1).long() * has.view(-1, *[1] * (len(shape) - 1))
