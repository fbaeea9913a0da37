"""Exported models that generate text about sounds: two graphs over one file of weights, run by the model's class."""

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
from peftfx.generation.step_sounds import GeneratesWithSounds
from peftfx.serving.beside_text.own_class import ByOwnClass
from peftfx.serving.call_inputs import ONNX_DTYPES, fitted, unfit_size
from peftfx.serving.generators import Buffered, ServedGenerator, class_of, skeleton
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.row_adapters import IDS
from peftfx.views.sounds.encoded import AUDIO_FEATURES, Sounds, picking
from peftfx.views.sounds.views import DecodeWithSounds


class ServedWithSounds(ByOwnClass, GeneratesWithSounds, ServedGenerator):  # type: ignore[misc]
    """A model of text and sounds in ONNX Runtime. A graph of its own encodes the sounds once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel) -> None:
        super().__init__(directory, model)
        self.graphs = {"audio_encoder": encoder, "model": model}
        self._encoder = encoder
        self.view = DecodeWithSounds(self.view.layers, self.view.positions, self._sounds_of(model))

    def encode(self, inputs: dict[str, Tensor], _: Cache | None) -> Mapping[str, Tensor]:
        """Run the graph of sounds.

        Raises:
            PeftfxError: it does not take sounds of this length or form.
        """
        encoder = self._encoder
        if why := unfit_size(encoder.metadata.get(SIZES_KEY, ""), encoder.axes, inputs):
            raise PeftfxError(why, str(encoder.path), "pass what the model's processor makes of other sounds")
        return encoder(**{name: fitted(value, encoder.types[name]) for name, value in inputs.items()})

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the arguments that are tensors, also of those that no graph takes."""
        return super().tensors | {*self.sounds.names}

    @cached_property
    def _stand_in(self) -> Any:
        parts = {"view": self.view, "step": self.step, "encode": self.encode}
        return over_graphs(skeleton(self), _OwnClass, **parts, generation_config=self.generation_config)

    def _sounds_of(self, model: OnnxModel) -> Sounds:
        """Return how the model reads sounds, as its graphs and its config tell."""
        token, axes = first_of(self.config, *SOUND_TOKENS), self._encoder.axes
        if not isinstance(token, int):
            what, hint = "the config names no token of sounds", "copy the base model's config.json again"
            raise PeftfxError(what, str(self.directory / "config.json"), hint)
        taken = [name for name in self._encoder.inputs if name != IDS]
        recording = next(name for name in RECORDINGS if name in taken)
        width, dtype = int(model.axes[AUDIO_FEATURES][-1]), ONNX_DTYPES[model.types[AUDIO_FEATURES]]
        shape = tuple(size if isinstance(size, int) else None for size in axes[recording][1:])
        masks = tuple(name for name in taken if name != recording)
        accepted = inspect.signature(class_of(self).forward).parameters  # type: ignore[attr-defined]
        picks = picking(accepted, masks, recording)
        heard = ONNX_DTYPES[self._encoder.types[recording]]
        return Sounds(token, width, dtype, heard, recording, shape, masks, picks=picks)


class _OwnClass(Buffered, GeneratesWithSounds):
    """The forward of the model's own class, which calls the graphs. The class's tensors are empty."""
