"""Steps of a decoder whose layers attend to images beside its text. Images are encoded once, before the text."""

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
from peftfx.generation.of_thread import OfThread
from peftfx.generation.split_images import split_images
from peftfx.generation.step import Generates
from peftfx.generation.step_images import EncodesImages
from peftfx.views.finding.cross_images import DecodeOverImages
from peftfx.views.images.encoded import Images


class GeneratesOverImages(EncodesImages, Generates):
    """A mixin for a class that generates with the views of a decoder that attends to images."""

    view: DecodeOverImages
    _shown = OfThread()

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
        """Return the logits, and the cache with these tokens added. Images come with the first tokens."""
        pixels = self.images_in(others)
        if others.pop("use_cache", None) is False or cache is None:
            cache = self.new_cache()
        if input_ids is not None:
            before = cache.get_seq_length()
            if not before:
                self._begin(cache, pixels, input_ids)
            elif pixels:
                hint = "begin a new text, or run the model by transformers"
                raise PeftfxError("images come with the first tokens of a text", self.images.inputs[0][0], hint)
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
        """Put the keys and values of images into an empty cache: zeros, as of one image, for texts without any.

        A text with fewer images than another has empty ones behind them, which are encoded too: in transformers' code,
        a token that sees no image attends to all pieces alike.
        """
        rows = len(tokens)
        past = [tensor.empty(rows, tokens.device) for tensor in kept_by(self.view.layers)]
        ones = split_images(self.images, pixels, empty=True) if pixels else []
        if len(ones) % rows:
            what = f"each text has as many images as the others, or empty ones, and there are {len(ones)} for {rows}"
            raise PeftfxError(what, self.images.inputs[0][0], "pass what the model's processor makes")
        each = max(len(ones) // rows, 1)
        found = self._each([{**one, **self.of_row(i // each, rows)} for i, one in enumerate(ones)])
        for i in self.view.of_images:
            past[i] = past[i].unsqueeze(2)
            if found:
                values = torch.cat([one[self.view.present_names[i]] for one in found]).to(past[i].dtype)
                past[i] = values.unflatten(0, (rows, -1)).transpose(1, 2).contiguous()
        cache_of(self.view.layers, past, cache)

    def _each(self, ones: list[dict[str, Tensor]]) -> list[Mapping[str, Tensor]]:
        """Return the keys and values of each image. Equal images, such as those of beams, are encoded once."""
        known: list[tuple[dict[str, Tensor], Mapping[str, Tensor]]] = []
        found = []
        for one in ones:
            made = next((made for own, made in known if all(torch.equal(own[n], v) for n, v in one.items())), None)
            if made is None:
                made = self.encode(one, None)
                known.append((one, made))
            found.append(made)
        return found

    def _mask(self, given: Tensor | None, tokens: Tensor, cache: DynamicCache, before: int) -> Tensor:
        """Return which tokens attend to which pieces: none in a text without an image. One token needs no mask."""
        keys = held(cache)[self.view.of_images[0]]
        shape = (*tokens.shape, keys.shape[2], self.view.cross.tiles)
        has = keys[:, :, :, :1].flatten(1).any(1).long()
        if given is None and shape[1] > 1 and bool(has.any()):
            hint = "pass what the model's processor makes"
            raise PeftfxError("a text with an image needs the mask of its image's pieces", CROSS_MASK, hint)
        if given is None:
            given = torch.ones(shape, dtype=torch.long, device=tokens.device)
        elif given.shape[1] != shape[1]:
            given = given[:, before : before + shape[1]]
        if given.shape != shape:
            what = f"the graph takes a mask {list(shape)}, and this call has {list(given.shape)}"
            raise PeftfxError(what, CROSS_MASK, "pass what the model's processor makes")
        return (given == 1).long() * has.view(-1, *[1] * (len(shape) - 1))
