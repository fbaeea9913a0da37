"""Exported models that generate text about images: two graphs over one file of weights, run by the model's class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.beside_text import CROSS_MASK
from peftfx.bases.processors.fixed_values import IMAGES_KEY, from_text
from peftfx.bases.processors.image_tokens import IMAGE_TOKEN_FIELDS
from peftfx.bases.processors.token_types import MODALITIES, TYPES
from peftfx.bases.processors.writers import writer_of
from peftfx.caches.held import KEY, VALUE, Held, KeptTensor
from peftfx.errors import PeftfxError
from peftfx.generation.over_graphs import over_graphs
from peftfx.generation.step import Generates, Step
from peftfx.generation.step_cross_images import GeneratesOverImages
from peftfx.generation.step_image_source import GeneratesFromImages
from peftfx.generation.step_images import GeneratesAsWriter, GeneratesWithImages
from peftfx.serving.beside_text.own_class import ByOwnClass
from peftfx.serving.call_inputs import ONNX_DTYPES
from peftfx.serving.generators import Buffered, ServedGenerator, ServedSeq2Seq, skeleton
from peftfx.serving.onnx_model import OnnxModel
from peftfx.serving.served import Served
from peftfx.views.decode import PRESENT
from peftfx.views.entry import POSITIONS
from peftfx.views.finding.cross_images import CrossImages, DecodeOverImages
from peftfx.views.images.encoded import BESIDE, IMAGE_FEATURES, Images
from peftfx.views.images.videos import FRAMES
from peftfx.views.images.views import DecodeWithImages
from peftfx.views.row_adapters import IDS


class ServedWithImages(ByOwnClass, GeneratesWithImages, ServedGenerator):  # type: ignore[misc]
    """A model of text and images in ONNX Runtime. A graph of its own encodes the images once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel) -> None:
        super().__init__(directory, model)
        self.graphs = {"vision_encoder": encoder, "model": model}
        images, self.encode = _images_of(self, model, encoder)
        self.numbers = numbers_of(self, encoder)
        self.view = DecodeWithImages(self.view.layers, self.view.positions, images)

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the arguments that are tensors, also of those that no graph takes."""
        return super().tensors | {*self.images.names, MODALITIES}

    @property
    def masking(self) -> Any:
        """The model's own class, without tensors."""
        return self._own

    @cached_property
    def _stand_in(self) -> Any:
        base = skeleton(self)
        way = _OwnClass if writer_of(base) is base else _OwnWriter
        return over_graphs(base, way, **parts_of(self), generation_config=self.generation_config)


class ServedOverImages(ByOwnClass, GeneratesOverImages, ServedGenerator):  # type: ignore[misc]
    """A model whose layers attend to images, in ONNX Runtime. A graph of its own encodes each image once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel) -> None:
        super().__init__(directory, model)
        self.graphs = {"vision_encoder": encoder, "model": model}
        inputs, self.encode = inputs_of(encoder)
        self.numbers = numbers_of(self, encoder)
        images = Images(token_of(self), 0, self.dtype, None, False, inputs)
        of_images = tuple(_of_one_image(encoder, i) for i in range(len(self.view.layers)))
        layers = tuple(one if one.kept else own for own, one in zip(self.view.layers, of_images, strict=True))
        cross = CrossImages(images, of_images, int(model.axes[CROSS_MASK][-1]))
        self.view = DecodeOverImages(layers, self.view.positions, cross)

    @cached_property
    def _stand_in(self) -> Any:
        return over_graphs(skeleton(self), _OverImages, **parts_of(self), generation_config=self.generation_config)


class ServedSeq2SeqWithImages(GeneratesFromImages, ServedSeq2Seq):  # type: ignore[misc]
    """An encoder-decoder of text with images in ONNX Runtime. A graph of its own encodes the images once."""

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel, vision: OnnxModel) -> None:
        super().__init__(directory, model, encoder)
        self.graphs = {"vision_encoder": vision, **self.graphs}
        self.images, self.encode = _images_of(self, encoder, vision)
        self.numbers = numbers_of(self, vision)

    @property
    def way(self) -> type[Generates]:
        """The mixin with the forward of the stand-in for the model's own class."""
        return _FromImages

    @property
    def parts(self) -> dict[str, Any]:
        """The attributes that the mixin needs."""
        return {**super().parts, "encode": self.encode, "images": self.images, "numbers": self.numbers}


class _FromImages(Buffered, GeneratesFromImages):
    """The forward of an encoder-decoder's own class, which calls the graphs. The class's tensors are empty."""


def parts_of(served: ServedWithImages | ServedOverImages) -> dict[str, Any]:
    """Return the attributes that the mixins of a stand-in need."""
    return {name: getattr(served, name) for name in ("view", "step", "encode", "numbers")}


def numbers_of(served: Served, *encoders: OnnxModel) -> Callable[[int], Tensor] | None:
    """Return the function that tells the adapters of rows, if a graph of images takes that of its row."""
    return served.numbers_of if any(IDS in encoder.inputs for encoder in encoders) else None


def _images_of(served: Served, model: OnnxModel, encoder: OnnxModel) -> tuple[Images, Step]:
    """Return how a model reads images, as its graphs tell, and the function that encodes an image.

    Args:
        served: the model.
        model: the graph that takes the features of images.
        encoder: the graph that makes them.
    """
    token, (inputs, encode) = token_of(served), inputs_of(encoder)
    fixed, picture, _ = from_text(encoder.metadata.get(IMAGES_KEY, ""))
    width, dtype = int(model.axes[IMAGE_FEATURES][-1]), ONNX_DTYPES[model.types[IMAGE_FEATURES]]
    axes = model.axes.get(POSITIONS, ())
    images = Images(
        *(token, width, dtype, None, True, inputs, TYPES in model.inputs, fixed),
        reads=IMAGES_KEY in encoder.metadata,
        sections=int(axes[0]) if len(axes) == 3 else 0,
        picture=picture,
        beside=tuple(name for name, _ in inputs if BESIDE in encoder.axes[name]),
    )
    return images, encode


def _of_one_image(encoder: OnnxModel, layer: int) -> Held:
    """Return what a layer of a cache keeps of an image, as a graph of images gives it; nothing for a layer of text."""
    names = [name for name in (KEY, VALUE) if f"{PRESENT}.{layer}.{name}" in encoder.outputs]
    made = {name: f"{PRESENT}.{layer}.{name}" for name in names}
    shapes = {name: tuple(int(size) for size in encoder.axes[own][1:]) for name, own in made.items()}
    return Held(tuple(KeptTensor(name, shapes[name], ONNX_DTYPES[encoder.types[own]]) for name, own in made.items()))


def token_of(served: Served, names: Sequence[str] = IMAGE_TOKEN_FIELDS, kind: str = "image") -> int:
    """Return the token that stands for a piece of an image, or of a video.

    Args:
        served: the model.
        names: the fields of its config that may tell the token.
        kind: the word for the message.
    """
    token = first_of(served.config, *names)
    if not isinstance(token, int):
        what, hint = f"the config names no {kind} token", "copy the base model's config.json again"
        raise PeftfxError(what, str(served.directory / "config.json"), hint)
    return token


def inputs_of(encoder: OnnxModel) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], Step]:
    """Return the inputs of a graph of images, with the shape of each for one image, and a function that runs it."""
    shapes = {name: encoder.axes[name] for name in encoder.inputs if name != IDS}
    inputs = tuple(
        (name, tuple(1 if size in (BESIDE, FRAMES) else int(size) for size in axes)) for name, axes in shapes.items()
    )
    dtypes, taken = {name: ONNX_DTYPES.get(encoder.types[name]) for name, _ in inputs}, set(encoder.inputs)
    return inputs, lambda given, _: encoder(
        **{n: v.to(dtypes.get(n) or v.dtype) for n, v in given.items() if n in taken}
    )


class _OverImages(Buffered, GeneratesOverImages):
    """The forward of the model's own class, which calls the graphs. The class's tensors are empty."""


class _OwnClass(Buffered, GeneratesWithImages):
    """The forward of the model's own class, which calls the graphs. The class's tensors are empty."""


class _OwnWriter(Buffered, GeneratesAsWriter):
    """The same, for a class whose own `generate` runs its parts."""
