"""Images: the two views of a model of text and images that generates, each run with its own graph.

    vision:  pixel_values, ... -> image_features
    decode:  the inputs for a text, and image_features -> logits, present.N.key/value

A call of the first view encodes one image. In the prefill, the features replace the text's image tokens, in order. A
step without image tokens gets `image_features` of length 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.token_types import TYPES, typed_masks
from peftfx.views.decode import Decode
from peftfx.views.view import Axes, RunView

IMAGE_FEATURES, IMAGE_TOKENS = "image_features", "image_tokens"
VISION = "vision"


@dataclass(frozen=True)
class Images:
    """What both views know of the model's images.

    Attributes:
        token: the id that stands for a piece of an image in the text.
        width: the features of a piece.
        dtype: the dtype of the features.
        each: how many pieces an image has, if the model needs the images separated; else None.
        listed: whether the model takes the features as a list of tensors.
        inputs: the names of the arguments that are encoded, with the number of axes of each.
        typed: whether the model's attention depends on the types of tokens; see `peftfx.bases.processors.token_types`.
    """

    token: int
    width: int
    dtype: torch.dtype
    each: int | None
    listed: bool
    inputs: tuple[tuple[str, int], ...]
    typed: bool = False

    def as_output(self, features: Tensor) -> BaseModelOutputWithPooling:
        """Return features [pieces, width] in the form in which the model's own encoder returns them."""
        shaped = features if self.each is None else features.reshape(-1, self.each, self.width)
        pooled = [features] if self.listed else shaped
        return BaseModelOutputWithPooling(pooler_output=pooled)  # type: ignore[call-arg, arg-type]


@dataclass(frozen=True)
class ImageEncoder:
    """The view that runs once for an image: it computes the features of the pieces, as wide as embedded text."""

    images: Images
    name = VISION
    trials: ClassVar[tuple[Mapping[str, int], ...]] = ({},)

    @property
    def axes(self) -> Axes:
        """The axes of the inputs, none of them free: a call is of one image of the model's size."""
        return {name: (None,) * count for name, count in self.images.inputs}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return a random image."""
        made = example_inputs(base, sizes={"batch": 1}, seed=seed)
        return {name: made[name] for name, _ in self.images.inputs}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs unchanged, as they have no keys and values."""
        return dict(inputs)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the image encoder, and the layers that make its features as wide as the text's."""
        return {IMAGE_FEATURES: encode_images(base, inputs)}

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the whole value."""
        return value


@dataclass(frozen=True)
class DecodeWithImages(Decode):
    """The decode view of a model that reads images in its text.

    Attributes:
        images: how the model reads images.
    """

    images: Images

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        types = {TYPES: ("batch", "total")} if self.images.typed else {}
        return {**super().axes, **types, IMAGE_FEATURES: (IMAGE_TOKENS, None)}

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Sizes for texts without images and with images."""
        few = self.images.each or 3
        return (
            *({**sizes, IMAGE_TOKENS: 0} for sizes in super().trials[:3]),
            {"batch": 1, "sequence": few + 4, "past": 0, IMAGE_TOKENS: few},
            {"batch": 3, "sequence": few + 2, "past": 2, IMAGE_TOKENS: 2 * few},
        )

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs: a text with image tokens after the first token of each row, and random features.

        If `sizes` are given, there are only as many image tokens as `image_tokens` says and as fit: whole images, after
        the first token of a row.
        """
        few, each = self.images.each or 3, self.images.each or 1
        wanted: dict[str, int] = (
            {"batch": 2, "sequence": few + 4, IMAGE_TOKENS: 2 * few} if sizes is None else {**sizes}
        )
        count = wanted.pop(IMAGE_TOKENS, 0)
        made = super().inputs(base, sizes=wanted, seed=seed)
        with unset_fake_temporarily():
            ids = made["input_ids"].clone()
            rows, length = ids.shape
            room = (length - 1) // each * each
            count = min(count // each * each, rows * room)
            for row in range(rows):
                many = min(room, count - room * row)
                ids[row, 1 : 1 + max(many, 0)] = self.images.token
            random = torch.Generator().manual_seed(seed)
            made["input_ids"] = ids
            if self.images.typed:
                made[TYPES] = torch.zeros_like(made["attention_mask"])
                made[TYPES][:, -length:] = (ids == self.images.token).long()
            made[IMAGE_FEATURES] = torch.randn(count, self.images.width, generator=random).to(self.images.dtype)
        return made

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with the past that the model computes for a random text."""
        own = {name: inputs[name] for name in (IMAGE_FEATURES, TYPES) if name in inputs}
        plain = {**inputs, IMAGE_FEATURES: inputs[IMAGE_FEATURES][:0]}
        if self.images.typed:
            past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
            plain[TYPES] = inputs[TYPES][:, :past]
        return {**super().with_past(base, plain, run, seed), **own}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        given = dict(inputs)
        features = given.pop(IMAGE_FEATURES)
        assert isinstance(features, Tensor)
        return super().__call__(base, {**given, "mm_encoder_outputs": {"image": self.images.as_output(features)}})

    def _run(self, base: nn.Module, given: Mapping[str, Any], cache: DynamicCache) -> dict[str, Tensor]:
        if self.images.typed:
            masks = typed_masks(base, given, cache)
            given = {**{name: value for name, value in given.items() if name != TYPES}, "attention_mask": masks}
        return super()._run(base, given, cache)


def encode_images(base: nn.Module, inputs: Mapping[str, object]) -> Tensor:
    """Return the features of images, [pieces, width], computed by the model's own code."""
    pooled = base.base_model.get_image_features(**inputs, return_dict=True).pooler_output  # type: ignore[union-attr, operator]
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return torch.cat([part.flatten(0, -2) for part in parts])
