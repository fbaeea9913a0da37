"""Fixed values: arguments of an image whose values are constants of a graph, and must be the same in each call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.errors import PeftfxError

IMAGES_KEY = "peftfx.images"  #: metadata key of a graph of images whose code reads values of an image's arguments


@dataclass(frozen=True)
class FixedValues:
    """The values of one argument for one image.

    Attributes:
        name: the argument of the model's forward.
        shape: its shape.
        numbers: its values in order.
        whole: whether they are whole numbers; otherwise they are booleans.
    """

    name: str
    shape: tuple[int, ...]
    numbers: tuple[int, ...]
    whole: bool = True

    @staticmethod
    def of(name: str, value: Tensor) -> FixedValues:
        """Return the values of a tensor."""
        numbers = tuple(map(int, value.flatten().tolist()))
        return FixedValues(name, tuple(value.shape), numbers, value.dtype != torch.bool)

    def tensor(self) -> Tensor:
        """Return the values as a tensor, int64 or bool."""
        dtype = torch.long if self.whole else torch.bool
        return torch.tensor(self.numbers, dtype=dtype).reshape(self.shape)

    def check(self, value: object, count: int, picture: Sequence[int]) -> None:
        """Refuse the argument of a call, for `count` images, if an image has other values.

        Args:
            value: the argument; None if the call has none.
            count: the number of images.
            picture: the height and width of pictures that have these values.
        """
        own = self.tensor()
        if isinstance(value, Tensor) and torch.equal(value.long(), own.long().repeat(count, *[1] * (own.ndim - 1))):
            return
        size = f", {picture[0]} x {picture[1]}" if picture else ""
        what = f"the graph was made for images with {self}, and this call has others"
        raise PeftfxError(what, self.name, f"resize the images to the size of the export{size}")

    def __str__(self) -> str:
        return f"{self.name} {self.tensor().tolist()}"


def as_text(values: Sequence[FixedValues], picture: Sequence[int], counted: tuple[str, int] | None) -> str:
    """Return fixed values, and the picture's height and width, as JSON for a model's metadata.

    Args:
        values: the values.
        picture: the height and width.
        counted: the argument that says how many slices a video has, and the place of the number.
    """
    told = {v.name: {"shape": v.shape, "numbers": v.numbers, "whole": v.whole} for v in values}
    more = {} if counted is None else {"counted": list(counted)}
    return json.dumps({"values": told, "picture": list(picture), **more})


def from_text(text: str) -> tuple[tuple[FixedValues, ...], tuple[int, ...], tuple[str, int]]:
    """Return what `as_text` wrote. An empty text has no values, and counts nothing: `("", 0)`.

    Raises:
        PeftfxError: the text is not what `as_text` writes.
    """
    if not text:
        return (), (), ("", 0)
    try:
        told = json.loads(text)
        values = told["values"]
        assert isinstance(values, Mapping)
        found = tuple(
            FixedValues(str(n), tuple(map(int, v["shape"])), tuple(map(int, v["numbers"])), bool(v["whole"]))
            for n, v in values.items()
        )
        counted, place = told.get("counted", ("", 0))
        return found, tuple(map(int, told["picture"])), (str(counted), int(place))
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise PeftfxError("the graph's metadata about images is damaged", IMAGES_KEY, "export again") from error
