"""The view in which sites of a model of text and images are found, if its code reads values of an image's arguments.

    input_ids, attention_mask, position_ids, pixel_values, ... -> the outputs of the forward

The call has one text with one image of a fixed size. Nothing is served by this view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.token_types import MODALITIES
from peftfx.views.decode import positions
from peftfx.views.entry import POSITIONS
from peftfx.views.images.encoded import Images, output_of_text, with_known
from peftfx.views.view import Axes, RunView

IMAGE_TEXT = "image-text"


@dataclass(frozen=True)
class ImageText:
    """A forward call with an image, whose fixed values are constants.

    Attributes:
        images: how the model reads images.
    """

    images: Images
    name = IMAGE_TEXT
    trials: ClassVar[tuple[Mapping[str, int], ...]] = ({},)

    @property
    def axes(self) -> Axes:
        """The names of the axes: none, so that all sizes are those of the example."""
        return {}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return a text with one random image."""
        made = example_inputs(base, sizes={"batch": 1}, seed=seed)
        fixed = {value.name for value in self.images.fixed} | {MODALITIES}
        found = {name: value for name, value in made.items() if name not in fixed}
        if self.images.sections:
            own = positions(found["attention_mask"])
            found[POSITIONS] = own.expand(self.images.sections, *own.shape).contiguous()
        return found

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs unchanged, as they have no keys and values."""
        return dict(inputs)

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model's forward."""
        with with_known(self.images, inputs) as (given, _):
            return output_of_text(base(**given))

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the whole value."""
        return value
