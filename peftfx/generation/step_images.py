"""Steps of models that read images in their text. Images are encoded once, before the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from peftfx.bases.processors.encoded_images import joined_features
from peftfx.bases.processors.readers import ENCODED_IMAGES
from peftfx.bases.processors.token_types import MODALITIES, TYPES, whole_types
from peftfx.errors import PeftfxError
from peftfx.generation.invocation import with_offsets
from peftfx.generation.of_thread import OfThread
from peftfx.generation.split_images import split_images
from peftfx.generation.step import Generates, Step
from peftfx.views.images.encoded import IMAGE_FEATURES, Images
from peftfx.views.images.views import DecodeWithImages
from peftfx.views.row_adapters import IDS


class EncodesImages:
    """A mixin for a class that encodes the images of a call with the view of an image.

    Attributes:
        encode: the function that runs the view of an image.
        images: how the model reads images.
        numbers: returns the numbers of the rows' adapters, given how many rows there are; None if the view of an image
            does not take that of its row.
    """

    encode: Step
    images: Images
    numbers: Callable[[int], Tensor] | None = None

    def encoded(self, inputs: Mapping[str, Tensor], tokens: Tensor | None) -> list[Tensor]:
        """Return the features of each image, [pieces, width]. Each image is encoded separately.

        Args:
            inputs: all arguments of the images, those that are fixed in the graph too.
            tokens: the text, [batch, sequence]. Images are in its rows in their order.
        """
        images = self.images
        ones = split_images(images, inputs)
        for fixed in images.fixed:
            fixed.check(inputs.get(fixed.name), len(ones), images.picture)
        found = self.each_encoded(self.encode, images, ones, tokens)
        if images.reads and any(bool(features.isnan().all()) for features in found):
            what = "a part of this image is empty, and the model's code computes something else there"
            raise PeftfxError(what, images.inputs[0][0], "run the model by transformers")
        return found

    def each_encoded(
        self, encode: Step, images: Images, ones: Sequence[dict[str, Tensor]], tokens: Tensor | None
    ) -> list[Tensor]:
        """Return the features of each image, under the adapter of its row.

        Args:
            encode: the function that runs their view.
            images: how the model reads them.
            ones: the arguments of each.
            tokens: the text, [batch, sequence].
        """
        left = [] if tokens is None else (tokens == images.token).sum(1).tolist()
        found = []
        for one in ones:
            row = next((row for row, count in enumerate(left) if count), 0)
            features = encode({**one, **self.of_row(row, len(left))}, None)[images.written.name]
            found.append(features)
            if left:
                left[row] = max(left[row] - len(features), 0)
        return found

    def of_row(self, row: int, rows: int) -> dict[str, Tensor]:
        """Return the number of the adapter of a row, if the view of an image takes it.

        Args:
            row: the place of the row in the batch.
            rows: how many rows there are.
        """
        return {} if self.numbers is None else {IDS: self.numbers(rows)[row : row + 1]}

    def images_in(self, named: dict[str, Any], images: Images | None = None) -> dict[str, Tensor]:
        """Take the arguments of images, or of videos, out of the arguments of a call; nothing if it has no pixels."""
        images = images or self.images
        given = {name: named.pop(name, None) for name in images.names}
        first = given[images.inputs[0][0]]
        return {n: v for n, v in given.items() if isinstance(v, Tensor)} if isinstance(first, Tensor) else {}

    def check_count(self, tokens: Tensor, count: int, images: Images | None = None) -> None:
        """Refuse a text that does not have a token for each piece of its images, or of its videos."""
        images = images or self.images
        wanted = int((tokens == images.token).sum())
        if wanted != count:
            what = f"the text has {wanted} {images.kind} tokens, and its {images.kind}s {count} pieces"
            raise PeftfxError(what, f"input_ids, {images.inputs[0][0]}", "make both by the model's processor")


class GeneratesWithImages(EncodesImages, Generates):
    """A mixin for a class that generates with the views of a model of text and images."""

    view: DecodeWithImages
    _features = OfThread()
    _types = OfThread()

    @property
    def images(self) -> Images:  # type: ignore[override]
        """How the model reads images."""
        return self.view.images

    @property
    def masking(self) -> Any:
        """A model of the class that makes masks from the types of tokens."""
        return self

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
        given, kinds = self.images_in(others), others.pop(MODALITIES, None)  # which positions were made of
        before = 0 if cache is None else cache.get_seq_length()
        encoded = (mm_encoder_outputs or {}).get(self.images.kind)
        features = self.features_of(self.images, given, encoded, self.encoded, input_ids, position_ids, before)
        if not self.images.typed and TYPES in inspect.signature(self.masking.forward).parameters:
            others.pop(TYPES, None)  # its code ignores them
        if input_ids is not None and self.images.typed:
            self._types = whole_types(self.masking, others.pop(TYPES, kinds), input_ids, before)
        self._features = features
        try:
            return super().forward(input_ids, attention_mask, position_ids, cache, logits_to_keep, **others)
        finally:
            self._features = self._types = None

    def features_of(
        self,
        images: Images,
        given: dict[str, Tensor],
        encoded: Any,
        encode: Callable[[Mapping[str, Tensor], Tensor | None], list[Tensor]],
        tokens: Tensor | None,
        positions: Tensor | None,
        before: int,
    ) -> Tensor:
        """Return the features of a call's images, or of its videos, [pieces, width].

        Args:
            images: how the model reads them.
            given: their arguments; empty for a call without any.
            encoded: the output of the model's encoder, if `generate` has run it.
            encode: the function that encodes them.
            tokens: the text, [batch, sequence].
            positions: the positions of its tokens.
            before: how many tokens are in the cache.
        """
        if given and self.images.sections and positions is None:
            what = f"a call with {images.kind}s needs the positions of its tokens"
            raise PeftfxError(what, "position_ids", "use generate, or pass position_ids")
        if encoded is not None:
            features = joined_features(encoded)
        else:
            features = torch.cat(encode(given, tokens)) if given else torch.zeros(0, images.width)
        if tokens is not None and (len(features) or not before):  # later, such a token is text that the model wrote
            self.check_count(tokens, len(features), images)
        return features.to(images.dtype)

    def beside(self) -> dict[str, Tensor]:
        """Return the image features of this call, and the types of its tokens if the model reads them."""
        assert self._features is not None
        types = {} if self._types is None else {TYPES: self._types}
        return {IMAGE_FEATURES: self._features, **types}

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *_: object
    ) -> dict[str, Any]:
        """Encode images once, before the prefill."""
        pixels = self.images_in(model_kwargs)
        model_kwargs.setdefault(ENCODED_IMAGES, {})
        if pixels:
            # a list with one entry for each image, as beams and samples repeat the images of a text together
            output = BaseModelOutputWithPooling(pooler_output=self.encoded(pixels, inputs_tensor))  # type: ignore[arg-type]
            model_kwargs[ENCODED_IMAGES][self.images.kind] = output
        return model_kwargs


class GeneratesAsWriter(GeneratesWithImages):
    """A mixin for a class whose own `generate` runs its parts, and then the `generate` of its language model."""

    main_input_name = "input_ids"

    def generate(
        self,
        pixel_values: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Generate as the language model does, from a text with a token for each piece of its images.

        The arguments are those of the class's own `generate`; all but images are given by name.
        """
        if input_ids is None:
            hint = "make the text by the model's processor, as for a prompt"
            raise PeftfxError("the graphs need a text with a token for each piece of its images", "input_ids", hint)
        images = {} if pixel_values is None else {self.images.inputs[0][0]: pixel_values}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **images, **options}
        return GenerationMixin.generate(self, **with_offsets(self.view, (), given))
