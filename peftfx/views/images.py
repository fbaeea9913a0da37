"""Images: the two views of a model of text and images that generates, each run with its own graph.

    vision:  pixel_values, ... -> image_features
    decode:  the inputs for a text, and image_features -> logits, present.N.key/value

A call of the first view encodes one image. In the prefill, the features replace the text's image tokens, in order. A
step without image tokens gets `image_features` of length 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.encoded_images import POOLED, Deeper, joined_features
from peftfx.bases.processors.fixed_values import FixedValues
from peftfx.bases.processors.token_types import TYPES, typed_call
from peftfx.bases.processors.writers import writer_of
from peftfx.errors import PeftfxError
from peftfx.graph.capturing.known_values import known_values
from peftfx.views.capturing.written_tokens import no_places_without_features
from peftfx.views.decode import Decode
from peftfx.views.entry import POSITIONS
from peftfx.views.view import Axes, RunView

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
            shaped = first if self.each is None else first.reshape(-1, self.each, first.shape[-1])
            found[self.field] = [first] if self.listed else shaped
        output = BaseModelOutputWithPooling(**found)  # type: ignore[arg-type]
        for name in self.idle:
            setattr(output, name, None)
        for name, layers in self.deeper:
            values = [[parts.pop(0)] if self.listed else parts.pop(0) for _ in layers]
            setattr(output, name, [v if n is None else (n, v) for n, v in zip(layers, values, strict=True)])
        return output

    def in_text(self, ids: Tensor, columns: slice, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return a text with image tokens at the start of some columns, and random features of as many pieces.

        Args:
            ids: the text, [batch, length].
            columns: where image tokens may stand.
            count: the most image tokens; there are only as many as fit into the columns, of whole images.
            seed: the seed of the features.
        """
        ids, each = ids.clone(), self.each or 1
        start, stop, _ = columns.indices(ids.shape[1])
        room = max(stop - start, 0) // each * each
        count = min(count // each * each, len(ids) * room)
        for row in range(len(ids)):
            ids[row, start : start + max(min(room, count - room * row), 0)] = self.token
        random = torch.Generator().manual_seed(seed)
        return ids, torch.randn(count, self.width, generator=random).to(self.dtype)

    def encoded(self, base: nn.Module, features: Tensor) -> dict[str, Any]:
        """Return the arguments of a forward that is given encoded images in place of images."""
        return {**self.without(base), "mm_encoder_outputs": {"image": self.as_output(features)}}

    def without(self, base: nn.Module) -> dict[str, None]:
        """Return the arguments of images that a forward without images must be given."""
        accepted = inspect.signature(base.forward).parameters
        needed = [n for n in self.names if n in accepted and accepted[n].default is inspect.Parameter.empty]
        return dict.fromkeys(needed)


@dataclass(frozen=True)
class ImageEncoder:
    """The view that runs once for an image: it computes the features of the pieces, as wide as embedded text."""

    images: Images
    name = VISION

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Sizes of a text beside the image; there are no others."""
        return tuple({BESIDE: length} for length in (4, 9, 1)) if self.images.beside else ({},)

    @property
    def axes(self) -> Axes:
        """The axes of the inputs. A call is of one image of the model's size; a text beside it has a free length."""
        text = (None, BESIDE)
        names = self.images.beside
        return {name: text if name in names else (None,) * len(shape) for name, shape in self.images.inputs}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return a random image."""
        length = {"sequence": sizes[BESIDE]} if sizes and BESIDE in sizes else {}
        made = example_inputs(base, sizes={"batch": 1, **length}, seed=seed)
        return {name: made[name] for name, _ in self.images.inputs}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs unchanged, as they have no keys and values."""
        return dict(inputs)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the image encoder, and the layers that make its features as wide as the text's."""
        return {IMAGE_FEATURES: encode_images(base, inputs, self.images)}

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
        found = {**super().axes, **types, IMAGE_FEATURES: (IMAGE_TOKENS, None)}
        return {**found, POSITIONS: (None, *found[POSITIONS])} if self.images.sections else found

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
        the first token of a row. A text without images that goes on from a past ends with an image token, if the model
        can write one.
        """
        few = self.images.each or 3
        wanted: dict[str, int] = (
            {"batch": 2, "sequence": few + 4, IMAGE_TOKENS: 2 * few} if sizes is None else {**sizes}
        )
        count = wanted.pop(IMAGE_TOKENS, 0)
        made = super().inputs(base, sizes=wanted, seed=seed)
        with unset_fake_temporarily():
            ids, features = self.images.in_text(made["input_ids"], slice(1, None), count, seed)
            made["input_ids"] = ids
            if self.images.sections:  # rows of an image's tokens have positions of their own
                rows = [made[POSITIONS], *(made[POSITIONS] // (n + 1) for n in range(self.images.sections - 1))]
                made[POSITIONS] = torch.stack(rows)
            if self.images.typed:
                made[TYPES] = torch.zeros_like(made["attention_mask"])
                made[TYPES][:, -ids.shape[1] :] = (ids == self.images.token).long()
            if not count and wanted.get("past") and self.images.token < _embedded(base):
                ids[0, -1] = self.images.token  # the model wrote it, so it has the type of a text's token
            made[IMAGE_FEATURES] = features
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
        if self.images.sections:
            own[POSITIONS] = inputs[POSITIONS]
        return {**super().with_past(base, plain, run, seed), **own}

    @property
    def rows_of_positions(self) -> tuple[int, ...]:
        """The axes of positions before the batch."""
        return (self.images.sections,) if self.images.sections else ()

    def positions_of(self, mask: Tensor) -> Tensor:
        """Return the positions of all tokens of a text without images."""
        found = super().positions_of(mask)
        return found.expand(self.images.sections, *found.shape) if self.images.sections else found

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        given = dict(inputs)
        features = given.pop(IMAGE_FEATURES)
        assert isinstance(features, Tensor)
        exporting = torch.compiler.is_exporting()
        if not exporting and not len(features):  # a step of text, as in the model's own `generate`
            return super().__call__(writer_of(base), {**given, **self.images.without(writer_of(base))})
        encoded = self.images.encoded(base, features)
        try:
            with no_places_without_features(self.images.token, features) if exporting else nullcontext():
                return super().__call__(base, {**given, **encoded})
        except AttributeError as error:
            if not isinstance(error.obj, BaseModelOutputWithPooling):
                raise
            what = (
                f"the code reads {error.name} of an encoded image, and the graph has the features of its pieces alone"
            )
            raise PeftfxError(what, type(base).__name__, "use the forward view") from error

    def _run(self, base: nn.Module, given: Mapping[str, Any], cache: DynamicCache) -> dict[str, Tensor]:
        if self.images.typed:
            given = typed_call(base, given, cache)
        return super()._run(base, given, cache)


def _embedded(base: nn.Module) -> int:
    """Return how many tokens a model embeds."""
    return int(getattr(base.get_input_embeddings(), "num_embeddings", 0))  # type: ignore[operator]


def encode_images(base: nn.Module, inputs: Mapping[str, object], images: Images) -> Tensor:
    """Return the features of images, [pieces, width], computed by the model's own code.

    In a capture, they are NaN for an image about which the code would decide otherwise than for the captured one.
    """
    with with_known(images, inputs) as (given, known):
        output = base.base_model.get_image_features(**given, return_dict=True)  # type: ignore[union-attr, operator]
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
