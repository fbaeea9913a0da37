"""Sounds that a model's forward encodes itself and writes into its embedded text.

The forward is run with a text of sounds' tokens up to the place where it writes the features: `masked_scatter`. So it
is where no method encodes sounds; and where texts may have images too, as such a forward selects and fills up what the
method returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.readers import reads_images
from peftfx.bases.processors.sounds.recordings import RECORDINGS

ENCODE_SOUND = "get_audio_features"  #: the method of transformers' models that encodes sounds
SOUND_TOKENS = ("audio_token_id", "audio_token_index")  #: the fields of a config that name the token of a sound's piece
SCATTERS = frozenset({torch.masked_scatter, Tensor.masked_scatter, Tensor.masked_scatter_})
"""The functions by which transformers' models write features into embedded text."""
COMPARES = frozenset({torch.eq, Tensor.eq, Tensor.__eq__})  #: how code compares numbers of tokens and of features
_SPREADS = frozenset({Tensor.expand_as, Tensor.expand, Tensor.to})
_TOKENS = 2  #: of the text: code that tells one token for a sound from one for each piece looks for two side by side

Encode = Callable[..., BaseModelOutputWithPooling]


def sound_encoder(model: nn.Module) -> Encode | None:
    """Return the function that encodes a model's sounds: its method, or its forward up to where it writes them.

    Its parameters are the names of a recording and of masks. The result has the features in `pooler_output`.
    """
    inner = getattr(model, "base_model", None)
    own: Encode | None = getattr(inner, ENCODE_SOUND, None)
    if inner is None or (own is not None and not reads_images(model)):
        return own
    return _forward_up_to_text(inner)


def needed_for_sounds(model: nn.Module) -> list[str]:
    """Return the names of the arguments that a model's sounds are not encoded without: of its method, if it has one."""
    encode = getattr(model.base_model, ENCODE_SOUND, None) or sound_encoder(model)
    assert encode is not None
    parameters = inspect.signature(encode).parameters.items()
    return [name for name, p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def hears_in_forward(model: nn.Module) -> bool:
    """Return whether a model has no method that encodes sounds, and its forward does."""
    return not hasattr(model.base_model, ENCODE_SOUND) and sound_encoder(model) is not None


def heard_and_seen(model: nn.Module) -> bool:
    """Return whether a model's texts may have sounds and images, so that its forward writes both."""
    return reads_images(model) and sound_encoder(model) is not None


def _forward_up_to_text(model: nn.Module) -> Encode | None:
    taken = inspect.signature(model.forward).parameters
    names = [name for name in RECORDINGS if name in taken]
    token = first_of(getattr(model, "config", None), *SOUND_TOKENS)
    if len(names) != 1 or not {"input_ids", "inputs_embeds"} <= {*taken} or not isinstance(token, int):
        return None
    masks = [name for name in taken if name.endswith("_mask") and name != "attention_mask"]

    def encode(return_dict: bool = True, **sounds: Tensor) -> BaseModelOutputWithPooling:
        with _disable_current_modes():
            ids = torch.full((1, _TOKENS), token, device=sounds[names[0]].device)
            mask = torch.ones_like(ids)
        with _UpToText(ids, mask) as written:
            try:
                model.forward(input_ids=ids, attention_mask=mask, **sounds)  # a capture of a call would miss its end
            except _Written:
                return BaseModelOutputWithPooling(pooler_output=written.features)  # type: ignore[arg-type]
        raise RuntimeError("its code writes no sounds into the embedded text")

    kinds = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in (*names, *masks)]
    encode.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    return encode


class _Written(Exception):
    """Ends a forward where it writes sounds into the embedded text."""


class _AnyNumber(int):
    """A number of tokens that code takes for the number of features, which is not known before."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class _AtPlaces:
    """What is at the places of sounds in the embedded text, of which code asks how much it is."""

    def numel(self) -> int:
        return _AnyNumber()


def _is_number(value: object) -> bool:
    """Return whether code may compare a number of tokens with this one of features: any but 0, that of no tokens."""
    return isinstance(value, torch.SymInt) or (type(value) is int and value != 0)


class _UpToText(TorchFunctionMode):
    """Ends a forward where it writes into embedded text, and keeps what it writes.

    What the code computes from the text alone is computed at once, outside fake tensors and captures, as it branches on
    it. It compares the number of a text's tokens, or of what is at their places in the embedded text, with that of the
    features; the text here has any number of tokens.

    Args:
        text: the text's tokens and their mask.

    Attributes:
        features: what the code writes, [pieces, width].
    """

    def __init__(self, *text: Tensor) -> None:
        super().__init__()
        self.features: Tensor | None = None
        self._text = {id(tensor): tensor for tensor in text}  # kept, so that no other tensor gets their ids
        self._spread = dict[int, Tensor]()  # masks of the text, over the width of its embedding

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in SCATTERS and args[0].is_floating_point():
            self.features = args[2] if len(args) > 2 else named["source"]
            raise _Written
        tensors = [leaf for leaf in pytree.tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        if func is Tensor.__getitem__ and args[0].is_floating_point() and self._is_places(args[1]):
            return _AtPlaces()
        if not tensors or any(id(tensor) not in self._text for tensor in tensors):
            made = func(*args, **named)
            if func in _SPREADS and self._is_places(args[0]):
                self._spread[id(made)] = made
            return made
        if func in COMPARES and not args[0].ndim and _is_number(args[1]):  # a number of tokens
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return torch.tensor(True)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            made = func(*args, **named)
        self._text |= {id(leaf): leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)}
        return _AnyNumber(made) if func is Tensor.item and type(made) is int else made

    def _is_places(self, index: object) -> bool:
        known = isinstance(index, Tensor) and (id(index) in self._text or id(index) in self._spread)
        return known and index.dtype == torch.bool  # type: ignore[attr-defined]
