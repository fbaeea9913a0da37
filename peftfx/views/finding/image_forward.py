"""The forward of a model of text and images whose code takes images of many sizes one after the other.

    input_ids, attention_mask, pixel_values, ... -> logits

The code of such a model reads the sizes of images, or makes a list with an entry for each image, so a capture of it has
a fixed number of images. Here the program of one image, captured by itself, runs for all images of a call at once, and
its features take the place of the text's image tokens. All images have the size of the example. If a token has several
positions, the graph computes them from the types of tokens; if that is not possible, they are an input, `position_ids`,
as in the decode view.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.fixed_values import FixedValues
from peftfx.bases.processors.image_tokens import most_in_a_text
from peftfx.bases.processors.readers import ENCODE, ENCODED_IMAGES, takes_encoded
from peftfx.bases.processors.token_types import MODALITIES, TYPES
from peftfx.graph.batching.run import run_for_several
from peftfx.graph.contexts import unchanged
from peftfx.graph.graph import BASE, Graph
from peftfx.options import FORWARD
from peftfx.views.decode import positions
from peftfx.views.entry import POSITIONS
from peftfx.views.finding.image_positions import ImagePositions
from peftfx.views.forward_axes import ALONG_IMAGES
from peftfx.views.images.encoded import Images, output_of_text
from peftfx.views.view import Axes, RunView

ALONG_PATCHES = "patches"  #: the axis along what an image has several of
_TEXT = ("batch", "sequence")


@dataclass(frozen=True)
class ForwardWithImages:
    """The forward of a model that reads images in its text, for any number of images of one size.

    Attributes:
        images: how the model reads images.
        pieces: how many tokens of the text stand for an image.
        types: the names of the inputs that are types of tokens.
        placed: the positions of an image's tokens, if a token has several and they follow from the types of tokens.
        compares: whether the code looks for empty parts of images. The logits are then NaN if there is one.
        encoder: the program of one image.
    """

    images: Images
    pieces: int
    types: tuple[str, ...]
    placed: ImagePositions | None
    compares: bool
    encoder: Graph = field(compare=False, repr=False)
    name = FORWARD

    @property
    def fixed(self) -> tuple[FixedValues, ...]:
        """The arguments whose values are the same for each image."""
        return self.images.fixed

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        found: dict[str, tuple[str | None, ...]] = dict.fromkeys(("input_ids", "attention_mask"), _TEXT)
        found |= dict.fromkeys(self.types, _TEXT)
        if self._takes_positions:
            found[POSITIONS] = (None, *_TEXT)
        return found | {name: (self._axis(name), *[None] * (len(shape) - 1)) for name, shape in self._shapes.items()}

    @property
    def _takes_positions(self) -> bool:
        return bool(self.images.sections) and self.placed is None

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of an image's arguments, fixed or not."""
        return {**dict(self.images.inputs), **{value.name: value.shape for value in self.images.fixed}}

    def _axis(self, name: str) -> str:
        """Return the name of the first axis of an image's argument."""
        shapes = self._shapes
        patches = next((shape[0] for shape in shapes.values() if shape[0] != 1), 1)
        return ALONG_IMAGES if shapes[name][0] == 1 else ALONG_PATCHES if shapes[name][0] == patches else f"{name}.0"

    @property
    def of_images(self) -> frozenset[str]:
        """The names of the axes along images and along their parts."""
        return frozenset(map(self._axis, self._shapes))

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Sizes of calls: with one image in each row, and with others."""
        return (
            {"batch": 1, "sequence": self.pieces + 5, ALONG_IMAGES: 1},
            {"batch": 3, "sequence": self.pieces + 2, ALONG_IMAGES: 3},
            {"batch": 1, "sequence": 2 * self.pieces + 8, ALONG_IMAGES: 2},
            {"batch": 2, "sequence": 2 * self.pieces + 9, ALONG_IMAGES: 1},
            {"batch": 4, "sequence": self.pieces + 9, ALONG_IMAGES: 4},
        )

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return texts with random images, as `example_inputs` deals them out to the rows."""
        wanted = dict(sizes or {"batch": 2, "sequence": self.pieces + 7})
        batch = wanted.get("batch", 2)
        per = {self._axis(name): shape[0] for name, shape in self._shapes.items()}
        known = [size // per[axis] for axis, size in wanted.items() if axis in per]
        count = max(1, known[0]) if known else batch
        most = most_in_a_text(count, batch)
        text = max(wanted.get("sequence", 0) - most * self.pieces, 1 if count == batch else most + 4)
        made = example_inputs(base, sizes={"batch": batch, "sequence": text, "images": count}, seed=seed)
        found = {name: made[name] for name in made if name not in (TYPES, MODALITIES) or name in self.types}
        if self._takes_positions:
            with unset_fake_temporarily():
                own = positions(found["attention_mask"])
                found[POSITIONS] = torch.stack([own // (n + 1) for n in range(self.images.sections)])
        return found

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs unchanged, as they have no keys and values."""
        return dict(inputs)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model's forward. In a capture, the images are encoded by the program of one image."""
        given = dict(inputs)
        fake = any(isinstance(value, FakeTensor) for value in given.values())
        if fake or torch.compiler.is_exporting():
            own = {name: given[name] for name in self.images.names}
            output = self.images.as_output(self._encoded(base, own))  # type: ignore[arg-type]
            if self.placed is not None:
                given[POSITIONS] = self.placed.of(given[MODALITIES], given["attention_mask"])  # type: ignore[arg-type]
            if not takes_encoded(base):
                with unchanged(base):
                    setattr(base.base_model, ENCODE, lambda *_, **__: output)
                    return output_of_text(base(**given))
            given = {name: value for name, value in given.items() if name not in own}
            given[ENCODED_IMAGES] = {"image": output}
        return output_of_text(base(**given))

    def _encoded(self, base: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
        """Return the features of all images, [pieces of all images, width]."""
        shapes = self._shapes
        one = next((name for name in given if shapes[name][0] == 1), None)
        first = self.images.inputs[0][0]
        count: int | SymInt = given[first].shape[0] // shapes[first][0] if one is None else given[one].shape[0]
        for name, value in given.items():
            torch._check(value.shape[0] == count * shapes[name][0])
        rows = {
            name.replace(".", "_"): torch.ops.aten.reshape.default(given[name], [count, *shape])
            for name, shape in self.images.inputs
        }
        program = self.encoder.module

        def read(target: str) -> Tensor:
            holder, _, path = target.partition(".")
            return operator.attrgetter(path)(base) if holder == BASE else operator.attrgetter(target)(program)

        assert isinstance(program, fx.GraphModule)
        (features,) = run_for_several(program, rows, read)
        return features.flatten(0, 1)

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the logits of tokens that are no padding, or those of whole texts."""
        return value[inputs["attention_mask"].bool()] if value.ndim > 2 else value
