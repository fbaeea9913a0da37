"""Finds how a model of text and images reads images, by a run of its image encoder on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.config_fields import first_of
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.encoded_images import FoundFeatures, by_image, main_features
from peftfx.bases.processors.fixed_values import FixedValues
from peftfx.bases.processors.image_tokens import IMAGE_TOKEN_FIELDS, split_known
from peftfx.bases.processors.pictures import chosen_size, pictures_vary, told_size
from peftfx.bases.processors.readers import ENCODE
from peftfx.bases.processors.token_types import TYPES, makes_masks, reads_types
from peftfx.errors import PeftfxError, first_line, listed, raise_if_memory_is_out
from peftfx.graph.capturing.known_values import known_values
from peftfx.graph.contexts import unchanged
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.handed.text import ignores
from peftfx.views.finding.image_positions import own_positions
from peftfx.views.images.encoded import Images

_LITTLE = 0.05  #: a difference of features that is rounding, by how far those of two images differ


def find_images(base: nn.Module, *, of_any_size: bool = False) -> Images:
    """Return how a model reads images.

    Args:
        base: the model.
        of_any_size: accept a picture of an arbitrary size where the size of pictures decides how many pieces they have.

    Raises:
        PeftfxError: no example of an image is known, the model's image encoder does not run on it, or the size of
            pictures matters and none is chosen.
    """
    accepted = inspect.signature(base.base_model.get_image_features).parameters  # type: ignore[union-attr, arg-type]
    token = first_of(base.config, *IMAGE_TOKEN_FIELDS)
    made = example_inputs(base, sizes={"batch": 1})
    given = {name: value for name, value in made.items() if name in accepted}
    if not isinstance(token, int) or not given:
        what = "the model's config names no image token" if given else "peftfx cannot make an example of an image"
        raise PeftfxError(what, type(base).__name__, "export its forward view, with inputs=... of a call")
    if not of_any_size:
        _refuse_unchosen_size(base, accepted)
    typed = reads_types(base)
    if typed and not makes_masks(base):
        typed = not ignores(base, TYPES, made["input_ids"])
    if typed and not makes_masks(base):
        what = "the model's attention finds images by token types, and its class has no function that makes such masks"
        raise PeftfxError(what, type(base).__name__, "export its forward view")
    output, fixed, reads = encoded_on_fakes(base, given, ENCODE)
    found = FoundFeatures.of(output)
    names = {value.name for value in fixed}
    inputs = {name: tuple(value.shape) for name, value in given.items() if name not in names}
    return Images(
        token,
        found.width,
        found.first.dtype,
        each=int(found.first.shape[-2]) if not found.listed and found.first.ndim > 2 else None,
        listed=found.listed,
        inputs=tuple(inputs.items()),
        typed=typed,
        fixed=fixed,
        reads=reads,
        sections=_sections(base, made),
        deeper=found.deeper,
        picture=chosen_size() or (),
        field=found.field,
        idle=found.idle,
        beside=tuple(name for name in inputs if _beside(name, inputs)),
    )


def _refuse_unchosen_size(base: nn.Module, accepted: Collection[str]) -> None:
    """Refuse a model whose pictures have no size of their own, if the user has chosen none."""
    if chosen_size() is None and pictures_vary(base, accepted):
        what = "the size of a picture decides how many pieces it has, and no size is chosen"
        raise PeftfxError(what, type(base).__name__, "pass --image-size HEIGHTxWIDTH (image_size=)")
    if told_size(base) is None:
        told = "neither the model's config nor a processor beside it tells the size of pictures"
        what = f"{told}, which --image-size HEIGHTxWIDTH (image_size=) chooses"
        raise PeftfxError(what, type(base).__name__, "pass it, or put the model's processor files beside the model")


def _beside(name: str, names: Collection[str]) -> bool:
    """Return whether an argument of an image encoder is of a text: its tokens, or their mask."""
    part = name.removesuffix("_input_ids").removesuffix("_attention_mask")
    return part != name and f"{part}_input_ids" in names


def encoded_on_fakes(
    base: nn.Module, given: Mapping[str, Tensor], method: str
) -> tuple[Any, tuple[FixedValues, ...], bool]:
    """Run the encoder of images, or of videos, on fake tensors.

    Args:
        base: the model.
        given: the arguments of one image.
        method: the method that encodes it.

    Returns:
        What it gives, the arguments whose values its code reads, and whether it reads any values.

    Raises:
        PeftfxError: it does not run.
    """
    encode = getattr(base.base_model, method)
    with fake_run(base) as fake:
        try:
            fed = {name: fake(value) for name, value in given.items()}
            output = encode(**fed, return_dict=True)
            sizes = [size for part in by_image(main_features(output)[1]) for size in part.shape]
            if all(type(size) is int for size in sizes) and not _has_read(fake):
                return output, (), False
        except Exception:  # whatever the model's code raises where it reads values
            pass
        rest, known = split_known(given)
        try:
            fed = {name: fake(value) for name, value in rest.items()}
            with known_values(known.values(), fed.values()):
                output = encode(**fed, **known, return_dict=True)
            main_features(output)
        except Exception as error:
            raise_if_memory_is_out(error)
            accepted = inspect.signature(encode).parameters
            others = [n for n, p in accepted.items() if n not in given and "Tensor" in str(p.annotation)]
            why = f"it takes {listed(others, 3)} too, for which there is no example" if others else first_line(error)
            kind = "image" if method == ENCODE else "video"
            what = f"the model's {kind} encoder does not run by itself: {why}"
            raise PeftfxError(
                what, type(base).__name__, "export its forward view, with inputs=... of a call"
            ) from error
    return output, tuple(FixedValues.of(name, value) for name, value in known.items()), True


def are_apart(alone: Sequence[Tensor], together: Tensor) -> bool:
    """Return whether images encoded together have the features that each has alone, but for rounding."""
    joined = torch.cat(list(alone))
    if together.shape != joined.shape or any(one.shape != alone[0].shape for one in alone):
        return False
    return float((joined - together).abs().max()) <= _LITTLE * float((alone[0] - alone[1]).abs().max())


def _has_read(fake: Callable[[Tensor], Tensor]) -> bool:
    """Return whether code on the fake tensors of a dry run has read numbers from them."""
    env = getattr(getattr(fake, "__self__", None), "shape_env", None)
    return env is not None and env.unbacked_symint_counter > 0


def _sections(base: nn.Module, made: Mapping[str, Tensor]) -> int:
    """Return how many positions each token of a text with an image, `made`, has by the model's own class; 0 for one."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return 0
    with unchanged(base), unset_fake_temporarily(), torch.device("cpu"):
        ids = torch.zeros(1, 2, dtype=torch.long)
        calls = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, made)
        found = (own_positions(base, call) for call in calls)  # some give a text without images one row
        return next((int(own.shape[0]) for own in found if own is not None and own.ndim == 3), 0)
