"""Videos beside a text: what the views know of them, and the pieces of a call's videos that are encoded one at a time.

Where the code gives each slice of a video the features that it has alone, and numbers say how many slices there are
(`video_grid_thw`), a graph encodes one slice. Otherwise it encodes one video, with any number of frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.bases.processors.videos import ENCODE_VIDEO
from peftfx.errors import PeftfxError
from peftfx.views.images.encoded import Images

FRAMES = "frames"  #: the axis of a video along its frames
VIDEO = "video"
VIDEO_FEATURES, VIDEO_PIECES = f"{VIDEO}_features", f"{VIDEO}_tokens"  #: the input of a text's graph, and its axis


@dataclass(frozen=True)
class Videos(Images):
    """What the views know of a model's videos: an image stands for a slice of a video, or for a whole one.

    Attributes:
        counted: the argument that says how many slices a video has; empty if a whole video is encoded.
        place: the place of that number among those of the argument.
        axes: how many axes the features of a call's videos have.
    """

    kind: ClassVar[str] = VIDEO
    encoder: ClassVar[str] = ENCODE_VIDEO

    counted: str = ""
    place: int = 0
    axes: int = 2

    def shaped(self, features: Tensor) -> Tensor:
        """Return features [pieces, width] with the axes that the model's own encoder gives them."""
        return features.reshape(*[1] * (self.axes - 2), -1, features.shape[-1])

    def units(self, inputs: Mapping[str, Tensor]) -> list[list[dict[str, Tensor]]]:
        """Return the arguments of each slice of each video, or of each whole video, that the graph takes.

        Raises:
            PeftfxError: an argument is missing, or has not the shape of whole videos.
        """
        missing = next((name for name in self.names if name not in inputs), None)
        if missing is not None:
            raise PeftfxError("the graph of videos needs this argument too", missing, "pass what the processor makes")
        given = {name: inputs[name] for name, _ in self.inputs}
        self._check(given)
        if not self.counted:
            count = min(len(value) for value in given.values())
            return [[{name: value[i : i + 1] for name, value in given.items()}] for i in range(count)]
        counts = self._counts(inputs)
        rows = {name: value.split(shape[0]) for (name, shape), value in zip(self.inputs, given.values(), strict=True)}
        whole = next(iter(rows.values()))
        if len(whole) != sum(counts):
            first, told = self.inputs[0][0], inputs[self.counted].tolist()
            what = f"{first} has the patches of {len(whole)} slices, but {self.counted} {told} counts {sum(counts)}"
            raise PeftfxError(what, first, "pass what the model's processor makes")
        slices = iter({name: values[i] for name, values in rows.items()} for i in range(len(whole)))
        return [[next(slices) for _ in range(count)] for count in counts]

    def _check(self, given: Mapping[str, Tensor]) -> None:
        for (name, shape), value in zip(self.inputs, given.values(), strict=True):
            free = 1 if self.counted else 2  # the axes whose sizes are not those of one slice
            fits = value.ndim == len(shape) and tuple(value.shape[free:]) == shape[free:]
            if not fits or (self.counted and len(value) % shape[0]):
                told = ["any" if i < free else size for i, size in enumerate(shape)]
                size = ", ".join(map(str, told))
                what = f"the graph takes [{size}] for videos, and this call has {list(value.shape)}"
                raise PeftfxError(what, name, "make the frames as large as those of the export")

    def _counts(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return how many slices each video has, and refuse other numbers that are not those of the export."""
        told = inputs[self.counted]
        for value in self.fixed:
            given = inputs[value.name].clone()
            if value.name == self.counted:
                given[:, self.place] = value.tensor()[:, self.place]
            if not torch.equal(given.long(), value.tensor().long().repeat(len(told), *[1] * (given.ndim - 1))):
                size = f", {self.picture[0]} x {self.picture[1]}" if self.picture else ""
                what = f"the graph was made for slices of videos with {value}, and this call has others"
                hint = f"make the frames as large as those of the export{size}; some processors shrink a long video's"
                raise PeftfxError(what, value.name, hint)
        return [int(count) for count in told[:, self.place].tolist()]
