"""Exported models that generate text about sounds, perhaps beside images: graphs over one file of weights, run by the
model's class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.sounds.in_forward import SOUND_TOKENS
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.errors import PeftfxError
from peftfx.formats import SIZES_KEY
from peftfx.generation.over_graphs import over_graphs
from peftfx.generation.step_sounds import (
    GeneratesWithImagesAndSounds,
    GeneratesWithSounds,
    GeneratesWithVideosAndSounds,
)
from peftfx.serving.beside_text.images import ServedWithImages, parts_of
from peftfx.serving.beside_text.own_class import ByOwnClass
from peftfx.serving.beside_text.videos import ServedWithVideos
from peftfx.serving.call_inputs import ONNX_DTYPES, fitted, unfit_size
from peftfx.serving.generators import Buffered, ServedGenerator, class_of, skeleton
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.row_adapters import IDS
from peftfx.views.sounds.beside_images import DecodeWithImagesAndSounds, DecodeWithVideosAndSounds
from peftfx.views.sounds.encoded import AUDIO_FEATURES, Sounds, picking
from peftfx.views.sounds.views import DecodeWithSounds


class Hearing(GeneratesWithSounds):
    """A mixin, before the steps of a served model, for one whose sounds are encoded by a graph of their own."""

    directory: Path
    config: Any
    _hearing: OnnxModel

    def encode_sounds(self, inputs: dict[str, Tensor], _: Cache | None) -> Mapping[str, Tensor]:
        """Run the graph of sounds.

        Raises:
            PeftfxError: it does not take sounds of this length or form.
        """
        encoder = self._hearing
        if why := unfit_size(encoder.metadata.get(SIZES_KEY, ""), encoder.axes, inputs):
            raise PeftfxError(why, str(encoder.path), "pass what the model's processor makes of other sounds")
        return encoder(**{name: fitted(value, encoder.types[name]) for name, value in inputs.items()})

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the arguments that are tensors, also of those that no graph takes."""
        found: frozenset[str] = super().tensors  # type: ignore[misc]
        return found | {*self.sounds.names}

    def _sounds_of(self, model: OnnxModel) -> Sounds:
        """Return how the model reads sounds, as its graphs and its config tell."""
        token, axes = first_of(self.config, *SOUND_TOKENS), self._hearing.axes
        if not isinstance(token, int):
            what, hint = "the config names no token of sounds", "copy the base model's config.json again"
            raise PeftfxError(what, str(self.directory / "config.json"), hint)
        taken = [name for name in self._hearing.inputs if name != IDS]
        recording = next(name for name in RECORDINGS if name in taken)
        width, dtype = int(model.axes[AUDIO_FEATURES][-1]), ONNX_DTYPES[model.types[AUDIO_FEATURES]]
        shape = tuple(size if isinstance(size, int) else None for size in axes[recording][1:])
        masks = tuple(name for name in taken if name != recording)
        accepted = inspect.signature(class_of(self).forward).parameters  # type: ignore[arg-type, attr-defined]
        picks = picking(accepted, masks, recording)
        heard = ONNX_DTYPES[self._hearing.types[recording]]
        return Sounds(token, width, dtype, heard, recording, shape, masks, picks=picks)


class ServedWithSounds(Hearing, ByOwnClass, ServedGenerator):  # type: ignore[misc]
    """A model of text and sounds in ONNX Runtime. A graph of its own encodes the sounds once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel) -> None:
        super().__init__(directory, model)
        self.graphs = {"audio_encoder": encoder, "model": model}
        self._hearing = encoder
        self.view = DecodeWithSounds(self.view.layers, self.view.positions, self._sounds_of(model))

    @cached_property
    def _stand_in(self) -> Any:
        parts = {"view": self.view, "step": self.step, "encode_sounds": self.encode_sounds}
        return over_graphs(skeleton(self), _OwnClass, **parts, generation_config=self.generation_config)


class ServedWithImagesAndSounds(Hearing, ServedWithImages):  # type: ignore[misc]
    """A model of text, images and sounds in ONNX Runtime. Graphs of their own encode images and sounds once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel, sounds: OnnxModel) -> None:
        super().__init__(directory, model, encoder)
        self.graphs = {"vision_encoder": encoder, "audio_encoder": sounds, "model": model}
        self._hearing = sounds
        view = self.view
        self.view = DecodeWithImagesAndSounds(view.layers, view.positions, view.images, self._sounds_of(model))

    @cached_property
    def _stand_in(self) -> Any:
        parts = parts_of(self) | {"encode_sounds": self.encode_sounds}
        return over_graphs(skeleton(self), _Seeing, **parts, generation_config=self.generation_config)


class ServedWithVideosAndSounds(Hearing, ServedWithVideos):  # type: ignore[misc]
    """A model of text, images, videos and sounds in ONNX Runtime. Graphs of their own encode all but the text once."""

    def __init__(
        self, directory: Path, model: OnnxModel, encoder: OnnxModel, videos: OnnxModel, sounds: OnnxModel
    ) -> None:
        super().__init__(directory, model, encoder, videos)
        encoders = {"vision_encoder": encoder, "video_encoder": videos, "audio_encoder": sounds}
        self.graphs = {**encoders, "model": model}
        self._hearing = sounds
        seen = self.view.layers, self.view.positions, self.view.images, self.view.videos
        self.view = DecodeWithVideosAndSounds(*seen, self._sounds_of(model))

    @cached_property
    def _stand_in(self) -> Any:
        parts = parts_of(self) | {"encode_video": self.encode_video, "encode_sounds": self.encode_sounds}
        return over_graphs(skeleton(self), _Watching, **parts, generation_config=self.generation_config)


class _OwnClass(Buffered, GeneratesWithSounds):
    """The forward of the model's own class, which calls the graphs. The class's tensors are empty."""


class _Seeing(Buffered, GeneratesWithImagesAndSounds):  # type: ignore[misc]
    """The same, with images."""


class _Watching(Buffered, GeneratesWithVideosAndSounds):  # type: ignore[misc]
    """The same, with images and videos."""
