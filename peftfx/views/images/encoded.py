"""Encoded images: what the views know of a model's images, and how its own code encodes one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.processors.encoded_images import POOLED, Deeper, joined_features
from peftfx.bases.processors.fixed_values import FixedValues
from peftfx.bases.processors.readers import ENCODE, ENCODED_IMAGES
from peftfx.graph.capturing.known_values import known_values
from peftfx.views.written_features import WrittenFeatures

IMAGE_FEATURES, IMAGE_TOKENS = "image_features", "image_tokens"
VISION = "vision"
BESIDE = "image_text"  #: the axis of a text that an image encoder reads with an image


@dataclass(frozen=True)
class Images:
    """What both views know of the model's images.

    Attributes:
        token: the id that stands for a piece of an image in the text.
        width: the features of a piece.
        dtype: the dtype of the features.
        each: how many pieces an image has, if the model needs the images separated; else None.
        listed: whether the model takes the features as a list of tensors.
        inputs: the names of the arguments that are encoded, with the shape of each for one image.
        typed: whether the model's attention depends on the types of tokens; see `peftfx.bases.processors.token_types`.
        fixed: the arguments whose values for one image are constants of the graph, as the model's code reads them.
        reads: whether the model's code reads values of an image's arguments.
        sections: the number of rows of positions that each token has; 0 if a token has one position.
        deeper: the fields with features for deeper layers. They follow the text's features of a piece, and are as wide.
        picture: the height and width of pictures, if they were chosen; else empty.
        field: the field of the encoder's output with the text's features; empty if there are those for deeper layers
            alone.
        idle: other fields of the encoder's output, which hold no tensor.
        beside: the arguments of a text that the encoder reads with an image, of any length: its tokens and their mask.
    """

    kind: ClassVar[str] = "image"
    encoder: ClassVar[str] = ENCODE

    token: int
    width: int
    dtype: torch.dtype
    each: int | None
    listed: bool
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    typed: bool = False
    fixed: tuple[FixedValues, ...] = ()
    reads: bool = False
    sections: int = 0
    deeper: Deeper = ()
    picture: tuple[int, ...] = ()
    field: str = POOLED
    idle: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all arguments of an image, fixed or not."""
        return (*(name for name, _ in self.inputs), *(value.name for value in self.fixed))

    def as_output(self, features: Tensor) -> BaseModelOutputWithPooling:
        """Return features [pieces, width] in the form in which the model's own encoder returns them."""
        parts = list(features.chunk(bool(self.field) + sum(len(layers) for _, layers in self.deeper), -1))
        found = {}
        if self.field:
            first = parts.pop(0)
            found[self.field] = [first] if self.listed else self.shaped(first)
        output = BaseModelOutputWithPooling(**found)  # type: ignore[arg-type]
        for name in self.idle:
            setattr(output, name, None)
        for name, layers in self.deeper:
            values = [[parts.pop(0)] if self.listed else parts.pop(0) for _ in layers]
            setattr(output, name, [v if n is None else (n, v) for n, v in zip(layers, values, strict=True)])
        return output

    def shaped(self, features: Tensor) -> Tensor:
        """Return features [pieces, width] with the axes that the model's own encoder gives them."""
        return features if self.each is None else features.reshape(-1, self.each, features.shape[-1])

    @property
    def written(self) -> WrittenFeatures:
        """What a graph of the text takes in place of images, or of videos."""
        name, axis = f"{self.kind}_features", f"{self.kind}_tokens"
        return WrittenFeatures(name, axis, self.token, self.width, self.dtype, self.each)

    def encoded(self, base: nn.Module, features: Tensor) -> dict[str, Any]:
        """Return the arguments of a forward that is given encoded images in place of images."""
        return {**self.without(base), ENCODED_IMAGES: {self.kind: self.as_output(features)}}

    def without(self, base: nn.Module) -> dict[str, None]:
        """Return the arguments of images that a forward without images must be given."""
        accepted = inspect.signature(base.forward).parameters
        needed = [n for n in self.names if n in accepted and accepted[n].default is inspect.Parameter.empty]
        return dict.fromkeys(needed)


def encode_images(base: nn.Module, inputs: Mapping[str, object], images: Images) -> Tensor:
    """Return the features of images, [pieces, width], computed by the model's own code.

    In a capture, they are NaN for an image about which the code would decide otherwise than for the captured one.
    """
    with with_known(images, inputs) as (given, known):
        output = getattr(base.base_model, images.encoder)(**given, return_dict=True)
    features = joined_features(output, images.deeper)
    agreed = None if known is None else known.agreed()
    return features if agreed is None else torch.where(agreed, features, torch.nan)


@contextmanager
def with_known(images: Images, inputs: Mapping[str, object]) -> Iterator[tuple[dict[str, object], known_values | None]]:
    """Yield the arguments of a call with the fixed ones. In a capture, their values are known to the model's code."""
    with unset_fake_temporarily():
        fixed = {value.name: value.tensor() for value in images.fixed}
    given: dict[str, object] = {**inputs, **fixed}
    fake = any(isinstance(value, FakeTensor) for value in inputs.values())
    if not images.reads or not (fake or torch.compiler.is_exporting()):
        yield given, None
        return
    pixels = [value for name, value in inputs.items() if name in images.names and isinstance(value, Tensor)]
    with known_values(fixed.values(), pixels) as known:
        yield given, known


def output_of_text(output: Any) -> dict[str, Tensor]:
    """Return what a model computes of a text's tokens: the logits, or the last hidden states of one without a head."""
    name = "logits" if getattr(output, "logits", None) is not None else "last_hidden_state"
    return {name: getattr(output, name)}
