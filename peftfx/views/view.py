"""What makes a view of a model: the names of its inputs' axes, and configs that ask for no cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from peftfx.bases.config_fields import collect_configs, first_of

Axes = Mapping[str, tuple[str | None, ...]]
"""The name of each axis of each input; `None` where its size is the model's."""

RunView = Callable[["View", Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs a model in one of its views: given the view and its inputs, it returns the outputs by name."""


class View(Protocol):
    """A way of running a model that is not its forward as it stands: flat tensors in, named tensors out.

    Hashable, and equal to one of the same model that runs it in the same way.
    """

    @property
    def name(self) -> str:
        """Its own word."""

    @property
    def axes(self) -> Axes:
        """The names of its inputs' axes; the inputs' order is that of `inputs`."""

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Valid inputs, of these sizes of named axes."""

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """The same inputs, with what the model itself made of another text where they hold keys and values."""

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model."""

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """What an output of this name has where the mask shows something: what is computed for padding is nobody's."""

    @property
    def trials(self) -> Sequence[Mapping[str, int]]:
        """Sizes to try an export at: every way it is served."""


_TEXT = ("batch", "sequence")
_DECODER = ("batch", "decoder_sequence")
_AXES: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids", "input_values"), _TEXT),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"), _DECODER),
    "inputs_embeds": (*_TEXT, None),
    "encoder_hidden_states": (*_TEXT, None),
    "decoder_inputs_embeds": (*_DECODER, None),
    "pixel_values": ("batch", None, None, None),
    "pixel_values_videos": ("batch", None, None, None, None),
}


def name_axes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str | None, ...]]:
    """A name for each axis of each input, by the input's name; `None` where its size is the model's, not the call's.

    Axes of one name have one size: one that differs from the first of its name is named after its place, `input.1`.
    So are the axes of an unknown input, but for a first axis as long as the batch. The size of an image is the
    model's; give `capture` other names to leave it free.
    """
    ranked = sorted(tensors, key=lambda name: name not in _AXES)  # inputs of known meaning say how long an axis is
    first = next((tensors[name] for name in ranked if tensors[name].ndim), None)
    lengths = {} if first is None else {"batch": first.shape[0]}
    named = apart({name: _axes_of(name, tensors) for name in ranked}, tensors, lengths)
    return {name: named[name] for name in tensors}


def free_images(axes: Axes, model: nn.Module) -> Axes:
    """These names, but free heights and widths of images where the model's config tells no size that they have."""
    if sized_images(model) or not any(axes.get(name, ())[1:] == (None,) * 3 for name in _IMAGES):
        return axes
    return {**axes, **{n: (axes[n][0], None, "height", "width") for n in _IMAGES if axes.get(n, ())[1:] == (None,) * 3}}


def sized_images(model: nn.Module) -> bool:
    """Whether its config tells the size of the images that a model takes, or it is no model with a config."""
    config = getattr(model, "config", None)
    parts: dict[int, object] = {}
    collect_configs(config, parts)
    return not parts or any(
        first_of(part, "image_size", "img_size", "input_size") is not None for part in parts.values()
    )


_IMAGES = ("pixel_values",)


def apart(
    axes: Axes, tensors: Mapping[str, Tensor], lengths: Mapping[str, int] | None = None
) -> dict[str, tuple[str | None, ...]]:
    """These names, but where an axis is not as long as the first of its name: there that of its place, `input.1`.

    Args:
        axes: the name of each axis of each input.
        tensors: the inputs, in an order in which the first says how long an axis is.
        lengths: of axes whose length is known before.
    """
    known = dict(lengths or {})
    named: dict[str, tuple[str | None, ...]] = {}
    for name, own in axes.items():
        sizes = tensors[name].shape
        for axis, size in zip(own, sizes, strict=True):
            if axis is not None:
                known.setdefault(axis, size)
        pairs = enumerate(zip(own, sizes, strict=True))
        named[name] = tuple(a if a is None or known[a] == n else f"{name}.{i}" for i, (a, n) in pairs)
    return named


def _axes_of(name: str, tensors: Mapping[str, Tensor]) -> tuple[str | None, ...]:
    tensor = tensors[name]
    known: tuple[str | None, ...] = _AXES.get(name, ())
    if name == "labels" and tensor.ndim == 2 and not tensor.is_floating_point():
        known = _labels_axes(tensor, tensors)
    if name == "position_ids" and tensor.ndim == 3:  # one row of positions for each of the rotary sections
        known = (None, *_TEXT)
    if name.endswith("attention_mask") and tensor.ndim == 4:  # heads of its own it has if the model says so
        known = ("batch", None, "sequence", "sequence")
    if len(known) != tensor.ndim:
        known = ("batch", *(f"{name}.{i}" for i in range(1, tensor.ndim))) if tensor.ndim else ()
    return known


def _labels_axes(labels: Tensor, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Labels run along what the model predicts: the decoder's tokens if it has a decoder, else the text."""
    if any(name.startswith("decoder_") for name in tensors):
        return _DECODER
    text = next((tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    return _DECODER if text is None or text.shape[1] != labels.shape[1] else _TEXT


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, no config of the model or of its parts asks for a key/value cache; afterwards each is as it was.

    A forward view has no cache. An argument `use_cache` would reach few models: some take it through `**kwargs` and
    some not at all, and each part of a composed model reads its own config.
    """
    seen: dict[int, object] = {}
    for module in model.modules():
        collect_configs(getattr(module, "config", None), seen)
    active = [config for config in seen.values() if getattr(config, "use_cache", None) is True]
    for config in active:
        config.use_cache = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for config in active:
            config.use_cache = True  # type: ignore[attr-defined]
