"""The axes of a forward's inputs: those of `view.name_axes`, with images or sounds counted apart from texts.

A model of two encoders, such as CLIP, compares each text with each image. Its texts and its images are of any numbers:
one image and the names of ten classes, for example. A model that writes encoded images into embedded text takes any
number of images in each text. Other models pair them: a caption for each image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.bases.processors.readers import ENCODE
from peftfx.bases.processors.sounds.in_forward import sound_encoder
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.errors import raise_if_memory_is_out
from peftfx.views.arguments import named_tensors
from peftfx.views.dry_run import fake_run
from peftfx.views.view import Axes, name_axes

#: Inputs with a row for each text.
_OF_TEXTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
_EXTRACTS = "get_{}_features"  #: the method of a class that encodes one side by itself
ALONG_IMAGES, ALONG_SOUNDS = WRITTEN = "images", "sounds"  #: the axes along what is written into texts
_SIDES = {"image": "image_batch", "video": "image_batch", "audio": "audio_batch"}


def axes_of_forward(model: nn.Module, inputs: Mapping[str, object]) -> Axes:
    """Return a name for each axis of each input of a call of the model's forward.

    They are those of `name_axes`, unless the model's code takes other numbers of images or sounds than of texts. Then
    the axis along these has a name of its own. In a model that compares them with texts it is `image_batch` or
    `audio_batch`; in one that writes encoded images or sounds into texts, `images` or `sounds`. A contrastive loss
    (`return_loss`) is of pairs. Sounds in texts have the length of the call: their number of tokens follows from it,
    and most processors make one length.

    Args:
        model: the model.
        inputs: the keyword arguments of the call.
    """
    axes = name_axes(named_tensors(inputs))
    if "input_ids" not in inputs or inputs.get("return_loss"):
        return axes
    side, names = _compared(model, axes) or _written(model, axes)
    if side == ALONG_SOUNDS:
        axes = {**axes, **{name: (axes[name][0], *[None] * (len(axes[name]) - 1)) for name in names}}
    apart = {name: (side, *axes[name][1:]) for name in names if axes[name][:1] == ("batch",)}
    return {**axes, **apart} if apart and _takes_another_number(model, inputs, apart) else axes


def _compared(model: nn.Module, axes: Axes) -> tuple[str, list[str]] | None:
    """Return the axis along images or sounds of a model that compares them with texts, and the inputs that have it."""
    side = next((axis for name, axis in _SIDES.items() if hasattr(model, _EXTRACTS.format(name))), None)
    if side is None or not hasattr(model, _EXTRACTS.format("text")):
        return None
    return side, [name for name in axes if name not in _OF_TEXTS]


def _written(model: nn.Module, axes: Axes) -> tuple[str, list[str]]:
    """Return the axis along images or sounds of a model that writes them into texts, and the inputs of its encoder."""
    heard = any(name in RECORDINGS for name in axes)
    encode = sound_encoder(model) if heard else getattr(getattr(model, "base_model", None), ENCODE, None)
    taken = () if encode is None else inspect.signature(encode).parameters
    return ALONG_SOUNDS if heard else ALONG_IMAGES, [name for name in axes if name in taken and name not in _OF_TEXTS]


def _takes_another_number(model: nn.Module, inputs: Mapping[str, object], apart: Axes) -> bool:
    """Return whether a model runs, on fake tensors, with three texts and with two images."""

    def some(name: str, value: object) -> object:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value[:1].expand(2 if name in apart else 3, *value.shape[1:]).contiguous()

    given = {name: some(name, value) for name, value in inputs.items()}
    try:
        with fake_run(model) as fake:
            model(**pytree.tree_map_only(Tensor, fake, given))
    except Exception as error:  # a model's code raises various errors for numbers that it does not take
        raise_if_memory_is_out(error)
        return False
    return True
