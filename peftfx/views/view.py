"""View: the protocol of a view of a model, the names of its inputs' axes, calls with a cache, and a context without."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import collect_configs

Axes = Mapping[str, tuple[str | None, ...]]
"""The names of the axes of each input; `None` for a size that is the model's."""

MAY_BE_EMPTY = frozenset({"past"})  #: axes that are empty in the first call of a generation


class _Length(int):
    """A number of tokens that is compared by identity: a trial of as many tokens can be told from this one."""


LONG_TEXT = _Length(36)
"""The tokens of one compared text: T5, for example, computes distances from 16 tokens on in another way."""

RunView = Callable[["View", Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A function that runs a model in a view: it takes the view and its inputs, and returns the outputs by name."""


class View(Protocol):
    """A way of running a model other than its plain forward: flat tensors in, named tensors out.

    Views are hashable. Two views of a model are equal if they run it in the same way.
    """

    @property
    def name(self) -> str:
        """The view's name."""

    @property
    def axes(self) -> Axes:
        """The names of the axes of each input, in the order of `inputs`."""

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs with these sizes of named axes."""

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs with keys and values that the model itself computes for another text."""

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model."""

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return an output's values where the mask shows something. Values of padding have no meaning."""

    @property
    def trials(self) -> Sequence[Mapping[str, int]]:
        """Sizes at which an export is tried, for every way in which it is served."""


class WithoutPast:
    """The part of a view whose inputs have no keys and values, and whose outputs have no padding."""

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the inputs unchanged, as they have no keys and values."""
        return dict(inputs)

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return the whole value."""
        return value


@dataclass
class LastRun:
    """A function that runs the model in a view. If a call equals the call before, its outputs are returned again.

    Attributes:
        run: the function that runs the model.
    """

    run: RunView
    _last: tuple[View, Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    def __call__(self, view: View, feed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the outputs of the view for these inputs."""
        if self._last is None or self._last[0] != view or not _same(self._last[1], feed):
            self._last = view, feed, self.run(view, feed)
        return self._last[2]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


_TEXT = ("batch", "sequence")
_DECODER = ("batch", "decoder_sequence")
_IN_TEXT = "images_in_text"  #: the axis along a text's images, which it attends to by their tiles
_AXES: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "position_ids", "input_values"), _TEXT),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"), _DECODER),
    "inputs_embeds": (*_TEXT, None),
    "encoder_hidden_states": (*_TEXT, None),
    "decoder_inputs_embeds": (*_DECODER, None),
    "pixel_values": ("batch", None, None, None),
    "pixel_values_videos": ("batch", None, None, None, None),
    "cross_attention_mask": (*_TEXT, _IN_TEXT, None),
    "aspect_ratio_ids": ("batch", _IN_TEXT),
    "aspect_ratio_mask": ("batch", _IN_TEXT, None),
    "logits_to_keep": ("kept",),
    "img_ids": ("image_sequence", None),
    "txt_ids": ("sequence", None),
    **{
        f"added_cond_kwargs.{name}": ("batch", None)
        for name in ("text_embeds", "time_ids", "resolution", "aspect_ratio")
    },
}


def name_axes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str | None, ...]]:
    """Return a name for each axis of each input; None for a size that is the model's, not the call's.

    The result has the names by the input's name. Axes of one name have one size: an axis whose size differs from the
    first of its name is named after its place, `input.1`. So are the axes of an unknown input, except a first axis as
    long as the batch. The size of an image is the model's; give `capture` other names to leave it free.
    """
    # A text sets the number of rows, before an image, and inputs with known axes before others.
    ranked = sorted(tensors, key=lambda name: (_AXES.get(name) != _TEXT, name not in _AXES))
    first = next((tensors[name] for name in ranked if tensors[name].ndim), None)
    lengths = {} if first is None else {"batch": first.shape[0]}
    named = apart({name: _axes_of(name, tensors) for name in ranked}, tensors, lengths)
    return {name: named[name] for name in tensors}


def keep_ones(axes: Axes, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str | None, ...]]:
    """Return the names without those of axes of size 1 that are named after their place: `input.1`."""
    return {
        name: tuple(None if tensors[name].shape[i] == 1 and a == f"{name}.{i}" else a for i, a in enumerate(own))
        for name, own in axes.items()
    }


def apart(
    axes: Axes, tensors: Mapping[str, Tensor], lengths: Mapping[str, int] | None = None
) -> dict[str, tuple[str | None, ...]]:
    """Return the names, but rename each axis whose size differs from the first of its name: to `input.1`, by place.

    Args:
        axes: the name of each axis of each input.
        tensors: the inputs; the first with an axis of a name sets that name's size.
        lengths: known sizes of axes, by name.
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
    if name == "position_ids" and tensor.ndim == 3:  # one row of positions for each rotary section
        known = (None, *_TEXT)
    if known == _TEXT and _several_texts(tensor, tensors):
        known = ("batch", "choices", "sequence")
    if name == "pixel_values" and "aspect_ratio_ids" in tensors:  # images in tiles
        known = ("batch", _IN_TEXT, *(None,) * (tensor.ndim - 2))
    if name == "hidden_states" and "img_ids" in tensors:  # an image as a sequence of tokens
        known = ("batch", "image_sequence", None)
    if name.endswith("attention_mask") and tensor.ndim == 4 and len(known) != 4:  # its second axis may be the heads
        known = ("batch", None, "sequence", "sequence")
    if len(known) != tensor.ndim:
        known = ("batch", *(f"{name}.{i}" for i in range(1, tensor.ndim))) if tensor.ndim else ()
    return known


def _several_texts(tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether each row has several texts, of which the model chooses one: then their mask has three axes too."""
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None or mask is None or ids.ndim != 3:
        return False
    return ids.shape == mask.shape == tensor.shape


def _labels_axes(labels: Tensor, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the axes of labels: along the decoder's tokens if there is a decoder, else along the text."""
    if any(name.startswith("decoder_") for name in tensors):
        return _DECODER
    text = next((tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    return _DECODER if text is None or text.shape[1] != labels.shape[1] else _TEXT


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turn `use_cache` off in all configs of the model inside the context, and restore them after it.

    A forward view has no cache. The argument `use_cache` would not work for all models: some take it through
    `**kwargs`, some not at all, and each part of a composed model reads its own config.
    """
    with _turned_off(model, lambda config: ("use_cache",)):
        yield


@contextlib.contextmanager
def as_captured(model: nn.Module) -> Iterator[None]:
    """Run a model inside the context as graphs have it: without a cache, and with attention that a graph can hold.

    The kernels of flash and flex attention compute what torch's own attention does, and no graph has them. Nor has it
    the fast path of torch's encoder layers, which leaves out what a mask of padding hides: zeros come out there, in
    calls without gradients alone.
    """
    seen: dict[int, object] = {}
    for module in model.modules():
        collect_configs(getattr(module, "config", None), seen)
    kernels = [c for c in seen.values() if _KERNELS.search(str(getattr(c, _ATTENTION, None)))]
    before = [getattr(config, _ATTENTION) for config in kernels]
    for config in kernels:
        owners = [m for m in model.modules() if hasattr(m, "_supports_sdpa") and m.config is config]
        setattr(config, _ATTENTION, "sdpa" if all(m._supports_sdpa for m in owners) else "eager")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with without_cache(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, name in zip(kernels, before, strict=True):
            setattr(config, _ATTENTION, name)


_ATTENTION = "_attn_implementation_internal"  #: the field itself: the public one sets those of parts, too
_KERNELS = re.compile("flash|flex")  #: in the names of transformers' attention, also of kernels from a hub


def called_with_cache(model: nn.Module, **given: Any) -> Any:
    """Call a model for its logits and its cache, and return its output.

    What its configs ask for beside these is off: hidden states, or the logits of experts' routers, from which some code
    computes a loss in every call, and raises where the tokens of the cache are not in the call.
    """
    with _turned_off(model, lambda config: (n for n in getattr(config, "__dict__", ()) if n.startswith("output_"))):
        return model(**given, use_cache=True)


@contextlib.contextmanager
def _turned_off(model: nn.Module, names: Callable[[object], Iterable[str]]) -> Iterator[None]:
    """Set the fields of these names that are true, in all configs of the model, to false inside the context."""
    seen: dict[int, object] = {}
    for module in model.modules():
        collect_configs(getattr(module, "config", None), seen)
    active = [(c, name) for c in seen.values() for name in names(c) if getattr(c, name, None) is True]
    for config, name in active:
        setattr(config, name, False)
    try:
        yield
    finally:
        for config, name in active:
            setattr(config, name, True)
