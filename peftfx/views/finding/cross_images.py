"""Images that layers of a decoder attend to beside its text, as two graphs: their keys and values are computed once.

    vision:  pixel_values, ... -> present.N.key/value of the layers that attend to an image
    decode:  the inputs for a text, cross_attention_mask -> logits, present.N.key/value

The first graph encodes one image. Behind the heads, the second has an axis for a text's images: keys and values are
[batch, heads, images, pieces, width], and the mask is [batch, sequence, images, tiles]. Texts without an image have
zeros, as of one image that no token sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from peftfx.bases.config_fields import first_of
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.beside_text import CROSS_MASK
from peftfx.bases.processors.image_tokens import IMAGE_TOKEN_FIELDS
from peftfx.caches.cache import cache_of, empty_cache, held
from peftfx.caches.held import KEY, VALUE, Held, KeptTensor, cache_names
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.views.decode import PAST, PRESENT, Decode
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.decode_view import decode_view
from peftfx.views.images.encoded import VISION, Images
from peftfx.views.view import Axes, RunView, WithoutPast, called_with_cache

_TEXT = ("input_ids", "attention_mask")
_FORWARD = "use the forward view"
_OF_IMAGES = 5  #: the axes of keys and values of images: batch, heads, images, pieces, width
_IMAGES = "images"  #: the axis along the images of a text; in the sizes of a trial, 0 is for texts without one


@dataclass(frozen=True)
class CrossImages:
    """How a decoder attends to images.

    Attributes:
        images: the arguments of an image.
        layers: what each layer of the cache keeps of an image; empty for a layer of text.
        tiles: how many tiles an image has in the mask.
    """

    images: Images
    layers: tuple[Held, ...]
    tiles: int


@dataclass(frozen=True)
class CrossEncoder(WithoutPast):
    """The view that runs once for an image: it computes the keys and values of the layers that attend to it."""

    cross: CrossImages
    name = VISION
    trials: ClassVar[tuple[Mapping[str, int], ...]] = ({},)

    @property
    def axes(self) -> Axes:
        """The axes of the inputs, of one image of the model's size."""
        return {name: (None,) * len(shape) for name, shape in self.cross.images.inputs}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return a random image."""
        made = example_inputs(base, sizes={"batch": 1}, seed=seed)
        return {name: made[name] for name in self.axes}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the image encoder, and the parts of the decoder that read only what it gives."""
        some = next(value for value in inputs.values() if isinstance(value, Tensor))
        tokens = torch.zeros(1, 1, dtype=torch.long, device=some.device)  # any: what depends on them is not used
        cache = empty_cache(base)
        called_with_cache(base, input_ids=tokens, **inputs, cache=cache)
        kept: list[Any] = [layer for layer, own in zip(cache.layers, self.cross.layers, strict=True) if own.kept]
        found = [value for layer in kept for value in (layer.keys, layer.values)]
        return dict(zip(cache_names(PRESENT, self.cross.layers), found, strict=True))


@dataclass(frozen=True)
class DecodeOverImages(Decode):
    """The decode view of a model with layers that attend to images. These layers keep keys and values as they are.

    Attributes:
        cross: how the model attends to images.
    """

    cross: CrossImages

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        kept = {self.past_names[i]: ("batch", None, _IMAGES, None, None) for i in self.of_images}
        return {**super().axes, **kept, CROSS_MASK: ("batch", "sequence", _IMAGES, None)}

    @property
    def of_images(self) -> list[int]:
        """The places of keys and values of images among all tensors of the cache."""
        kept = [(layer, bool(image.kept)) for layer, image in zip(self.layers, self.cross.layers, strict=True)]
        places = [image for layer, image in kept for _ in layer.kept]
        return [i for i, image in enumerate(places) if image]

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Sizes for texts with several images, with one, and without."""
        counts = (1, 3, 2, 1, 0)
        return (*({**own, _IMAGES: n} for own, n in zip(super().trials, counts, strict=True)), super().trials[-2])

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs, with random keys and values of images, as many as `sizes` say for each text.

        The last of several texts sees one image less than the others.
        """
        wanted = {_IMAGES: 2} if sizes is None else {**sizes}
        images = wanted.pop(_IMAGES, 0)
        made = super().inputs(base, sizes=wanted, seed=seed)
        batch, sequence = made["input_ids"].shape
        count = max(images, 1)
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            mask = (torch.rand(batch, sequence, count, self.cross.tiles, generator=random) < 0.7).long()
            mask[batch - (batch > 1) :, :, count - 1 :] = 0
            for i in self.of_images:
                name = self.past_names[i]
                shape = (*made[name].shape[:2], count, *made[name].shape[2:])
                values = torch.randn(shape, generator=random) if images else torch.zeros(shape)
                made[name] = values.to(made[name].dtype)
        return {**made, CROSS_MASK: mask if images else torch.zeros_like(mask)}

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with the past that the model computes for a random text about the same images."""
        past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
        names = [self.past_names[i] for i in self.of_images]
        own = {name: inputs[name] for name in (CROSS_MASK, *names)}
        before = inputs[CROSS_MASK][:, -1:].expand(-1, past, -1, -1)

        def about_it(view: Any, feed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self.with_images(run(view, {**feed, **own, CROSS_MASK: before}), own)

        return {**super().with_past(base, inputs, about_it, seed), **own}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        given = dict(inputs)
        past: list[Any] = [given.pop(name) for name in self.past_names]
        images = [past[i] for i in self.of_images]
        seen = torch.compiler.is_exporting() or any(bool(value.any()) for value in images)
        if not seen:  # then the code of these layers does not run
            del given[CROSS_MASK]
            past = [value for i, value in enumerate(past) if i not in self.of_images]
        past = [value.flatten(2, 3) if value.ndim == _OF_IMAGES else value for value in past]
        layers = self.layers if seen else self._text
        made = self._run(base, given, cache_of(layers, past))
        return {name: value for name, value in made.items() if name not in self._image_names(PRESENT)}

    def with_images(self, made: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a call's outputs, with the keys and values of images that it was given: it does not give them back."""
        pairs = zip(self._image_names(PRESENT), self._image_names(PAST), strict=True)
        return {**made, **{present: given[past] for present, past in pairs}}

    @property
    def _text(self) -> tuple[Held, ...]:
        pairs = zip(self.layers, self.cross.layers, strict=True)
        return tuple(Held(()) if image.kept else own for own, image in pairs)

    def _image_names(self, kind: str) -> list[str]:
        return cache_names(kind, self.cross.layers)

    def _run(self, base: nn.Module, given: Mapping[str, object], cache: DynamicCache) -> dict[str, Tensor]:
        output = called_with_cache(base, **given, cache=cache)
        layers = self._text if CROSS_MASK not in given else self.layers
        return {"logits": output.logits, **dict(zip(cache_names(PRESENT, layers), held(cache), strict=True))}


def why_not_crossed(base: nn.Module) -> str:
    """Return why a model's decoder is not one that attends to images beside its text, or nothing if it is."""
    try:
        find_cross_images(base)
    except PeftfxError as error:
        return error.what
    return ""


def crosses(base: nn.Module) -> bool:
    """Return whether the code of a model's decoder takes a mask of images that its layers attend to."""
    return {CROSS_MASK, "cache"} <= set(inspect.signature(base.forward).parameters)


def find_cross_images(base: nn.Module) -> CrossImages:
    """Return how the layers of a model's decoder attend to images.

    They are found by two runs on fake tensors, with an image and without.

    Raises:
        PeftfxError: the model has no such layers, or no example of an image is known.
    """
    where, what = type(base).__name__, "no layer of the model's decoder attends to images beside its text"
    if not crosses(base):
        raise PeftfxError(what, where, _FORWARD)
    made = example_inputs(base, sizes={"batch": 1})
    token = first_of(base.config, *IMAGE_TOKEN_FIELDS)
    if CROSS_MASK not in made or not isinstance(token, int):
        raise PeftfxError("peftfx cannot make an example of an image", where, _FORWARD)
    with fake_run(base) as fake:
        found: list[list[Any]] = []  # the layers' keys and values, of a text and of a text with an image
        for given in ({name: made[name] for name in _TEXT}, made):
            cache = empty_cache(base)
            try:
                called_with_cache(base, **{name: fake(value) for name, value in given.items()}, cache=cache)
            except Exception as error:
                raise_if_memory_is_out(error)
                said = f"the model does not run with an image and a plain key/value cache: {first_line(error)}"
                raise PeftfxError(said, where, _FORWARD) from error
            found.append([(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers])
        layers = tuple(
            Held(()) if text[0] is not None or image[0] is None else _of_fixed_size(*image)
            for text, image in zip(*found, strict=True)
        )
    if not any(layer.kept for layer in layers) or layers[0].kept:  # the first layer counts a text's tokens
        raise PeftfxError(what, where, _FORWARD)
    inputs = tuple((name, tuple(value.shape)) for name, value in made.items() if name not in (*_TEXT, CROSS_MASK))
    images = Images(token, 0, made["pixel_values"].dtype, None, False, inputs)
    return CrossImages(images, layers, int(made[CROSS_MASK].shape[-1]))


def _of_fixed_size(keys: Tensor, values: Tensor) -> Held:
    """Return a layer that keeps keys and values of one image."""
    both = ((KEY, keys), (VALUE, values))
    return Held(tuple(KeptTensor(name, tuple(map(int, value.shape[1:])), value.dtype) for name, value in both))


def decode_over_images(base: nn.Module) -> DecodeOverImages:
    """Return the decode view of a model whose decoder attends to images.

    Raises:
        PeftfxError: the model has no such view.
    """
    view, cross = decode_view(base), find_cross_images(base)
    text = (*view.layers, *(Held(()) for _ in cross.layers[len(view.layers) :]))
    layers = tuple(image if image.kept else own for own, image in zip(text, cross.layers, strict=True))
    return DecodeOverImages(layers, view.positions, cross)
