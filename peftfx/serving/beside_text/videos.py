"""Exported models that generate text about images and videos: three graphs over one file of weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from peftfx.bases.processors.fixed_values import IMAGES_KEY, from_text
from peftfx.bases.processors.videos import VIDEO_TOKENS
from peftfx.generation.over_graphs import over_graphs
from peftfx.generation.step_videos import GeneratesWithVideos
from peftfx.serving.beside_text.images import ServedWithImages, inputs_of, numbers_of, parts_of, token_of
from peftfx.serving.call_inputs import ONNX_DTYPES
from peftfx.serving.generators import Buffered, skeleton
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.images.video_views import DecodeWithVideos
from peftfx.views.images.videos import VIDEO_FEATURES, Videos


class ServedWithVideos(GeneratesWithVideos, ServedWithImages):  # type: ignore[misc]
    """A model of text, images and videos in ONNX Runtime. Graphs of their own encode images and videos once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel, videos: OnnxModel) -> None:
        super().__init__(directory, model, encoder)
        self.graphs = {"vision_encoder": encoder, "video_encoder": videos, "model": model}
        self.numbers = numbers_of(self, encoder, videos)
        inputs, self.encode_video = inputs_of(videos)
        fixed, picture, (counted, place) = from_text(videos.metadata.get(IMAGES_KEY, ""))
        own = Videos(
            token=token_of(self, VIDEO_TOKENS, "video"),
            width=int(model.axes[VIDEO_FEATURES][-1]),
            dtype=ONNX_DTYPES[model.types[VIDEO_FEATURES]],
            each=None,
            listed=True,
            inputs=inputs,
            fixed=fixed,
            reads=IMAGES_KEY in videos.metadata,
            picture=picture,
            counted=counted,
            place=place,
        )
        self.view = DecodeWithVideos(self.view.layers, self.view.positions, self.view.images, own)

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the arguments that are tensors, also of those that no graph takes."""
        return super().tensors | {*self.videos.names}

    @property
    def of_positions(self) -> tuple[str, ...]:
        """The names of the arguments from which the model's own class computes positions alone."""
        found: tuple[str, ...] = self._stand_in.of_positions
        return found

    @cached_property
    def _stand_in(self) -> Any:
        parts = parts_of(self) | {"encode_video": self.encode_video}
        return over_graphs(skeleton(self), _OwnClass, **parts, generation_config=self.generation_config)


class _OwnClass(Buffered, GeneratesWithVideos):
    """The forward of the model's own class, which calls the graphs. The class's tensors are empty."""
