"""The view that encodes an image, and the decode view that reads encoded images in its text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.readers import ENCODED_IMAGES
from peftfx.bases.processors.token_types import TYPES, typed_call
from peftfx.bases.processors.writers import writer_of
from peftfx.errors import PeftfxError
from peftfx.views.capturing.written_tokens import no_places_without_features
from peftfx.views.entry import POSITIONS
from peftfx.views.images.encoded import BESIDE, IMAGE_FEATURES, VISION, Images, encode_images
from peftfx.views.view import Axes, RunView, WithoutPast
from peftfx.views.written_features import DecodeWithFeatures, WrittenFeatures


@dataclass(frozen=True)
class ImageEncoder(WithoutPast):
    """The view that runs once for an image: it computes the features of the pieces, as wide as embedded text."""

    images: Images
    name: ClassVar[str] = VISION

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

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the image encoder, and the layers that make its features as wide as the text's."""
        return {self.images.written.name: encode_images(base, inputs, self.images)}


@dataclass(frozen=True)
class DecodeWithImages(DecodeWithFeatures):
    """The decode view of a model that reads images in its text.

    Attributes:
        images: how the model reads images.
    """

    images: Images

    @property
    def written(self) -> WrittenFeatures:
        """The features of images."""
        return self.images.written

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        types = {TYPES: ("batch", "total")} if self.images.typed else {}
        found = {**super().axes, **types}
        for own in (self.written, *self.more):
            found[own.name] = found.pop(own.name)
        return {**found, POSITIONS: (None, *found[POSITIONS])} if self.images.sections else found

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs, with types of tokens and several positions for each if the model takes them.

        A token of an image that the model wrote has the type of a text's token.
        """
        made = super().inputs(base, sizes=sizes, seed=seed)
        ids, features = made["input_ids"], {own.name: made.pop(own.name) for own in (self.written, *self.more)}
        with unset_fake_temporarily():
            if self.images.sections:  # rows of an image's tokens have positions of their own
                rows = [made[POSITIONS], *(made[POSITIONS] // (n + 1) for n in range(self.images.sections - 1))]
                made[POSITIONS] = torch.stack(rows)
            if self.images.typed:
                made[TYPES] = torch.zeros_like(made["attention_mask"])
                if len(features[IMAGE_FEATURES]):
                    made[TYPES][:, -ids.shape[1] :] = (ids == self.images.token).long()
        return {**made, **features}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with the past that the model computes for a random text."""
        own = {name: inputs[name] for name in (TYPES, *([POSITIONS] if self.images.sections else ())) if name in inputs}
        plain = dict(inputs)
        if self.images.typed:
            past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
            plain[TYPES] = inputs[TYPES][:, :past]
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
        exporting = torch.compiler.is_exporting()
        taken = [(own, features) for own, features in self._taken(given) if exporting or len(features)]
        if not taken:  # a step of text, as in the model's own `generate`
            return super().__call__(writer_of(base), {**given, **self.images.without(writer_of(base))})
        encoded = {own.kind: own.as_output(features) for own, features in taken}
        try:
            places = {own.token: features for own, features in taken}
            with no_places_without_features(places) if exporting else nullcontext():
                return super().__call__(base, {**given, **self.images.without(base), ENCODED_IMAGES: encoded})
        except AttributeError as error:
            if not isinstance(error.obj, BaseModelOutputWithPooling):
                raise
            what = (
                f"the code reads {error.name} of an encoded image, and the graph has the features of its pieces alone"
            )
            raise PeftfxError(what, type(base).__name__, "use the forward view") from error

    def _taken(self, given: dict[str, object]) -> list[tuple[Images, Tensor]]:
        """Take the features out of the inputs of a call."""
        features = given.pop(IMAGE_FEATURES)
        assert isinstance(features, Tensor)
        return [(self.images, features)]

    def _run(self, base: nn.Module, given: Mapping[str, Any], cache: DynamicCache) -> dict[str, Tensor]:
        if self.images.typed:
            given = typed_call(base, given, cache)
        return super()._run(base, given, cache)
