"""Finds how a model of text and sounds reads sounds, by runs of its sound encoder on fake tensors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.dtypes import floating_dtype
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.image_size import Size
from peftfx.bases.processors.pictures import chosen_size
from peftfx.bases.processors.sounds.in_forward import (
    ENCODE_SOUND,
    SOUND_TOKENS,
    heard_and_seen,
    hears_in_forward,
    needed_for_sounds,
    sound_encoder,
)
from peftfx.bases.processors.sounds.in_text import sounds_in_text
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.views.capturing.raised import line_of
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.embedded_sounds import why_not_embedded
from peftfx.views.finding.handed.sounds import why_not_handed
from peftfx.views.finding.image_views import find_images
from peftfx.views.sounds.encoded import Sounds, encode_sounds, encoded_already, picking

#: How many times as long as an example's a recording is in a capture: code that cuts recordings into blocks then has
#: several blocks. One frame more leaves a rest in the last block, as most recordings do.
_LONGER = 7
_BRANCHES = "its code branches on a mask's values"
_known: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, Size | None], Sounds | PeftfxError]] = WeakKeyDictionary()
_HINT = "export its forward view (--view forward)"


def why_not_heard(base: nn.Module) -> str:
    """Return why a model's sounds cannot be encoded apart from its text, or nothing if they can."""
    if sound_encoder(base) is None:
        return f"the model's class has no sound encoder that runs by itself (`{ENCODE_SOUND}`)"
    accepted = inspect.signature(base.forward).parameters
    if "cache" not in accepted:
        return "the model's forward takes no cache"
    if heard_and_seen(base):
        try:
            find_images(base, of_any_size=True)
        except PeftfxError as error:
            return f"sounds go with images here, and {error.what}"
    return "" if _one_sound(base) else why_no_sound(base)


def why_no_sound(base: nn.Module) -> str:
    """Return why peftfx makes no example of a sound beside a text, if it makes none."""
    unknown = "peftfx makes no example of them beside a text"
    if sound_encoder(base) is None:
        return unknown
    if more := [name for name in needed_for_sounds(base) if name not in RECORDINGS and not name.endswith("mask")]:
        return f"the model's sound encoder needs {', '.join(more)} too, beside a recording and its masks"
    tried = [_encoded(base, sound) for sound in sounds_in_text(base, inspect.signature(base.forward).parameters)]
    whys = [why for why in tried if isinstance(why, str)]
    if whys and len(whys) == len(tried):  # in a shape that fits, the code comes as far as to read a mask's values
        why = next((why for why in whys if why.startswith(_BRANCHES)), whys[-1])
        return f"the model's sound encoder does not run on an example: {why}"
    return unknown


def _one_sound(base: nn.Module) -> dict[str, Tensor]:
    """Return an example of the arguments of one sound; nothing if there is none."""
    if heard_and_seen(base):  # an example of a call has an image in its text
        tried = sounds_in_text(base, inspect.signature(base.forward).parameters)
        return next((sound for sound in tried if not isinstance(_encoded(base, sound), str)), {})
    made = example_inputs(base, sizes={"batch": 1})
    return made if any(name in made for name in RECORDINGS) else {}


def why_left_out(base: nn.Module) -> str:
    """Return why a graph of a model that reads images and sounds takes no sounds."""
    try:
        find_sounds(base)
    except PeftfxError as error:
        return error.what
    return "the graphs of --view decode take them"


def hears(base: nn.Module) -> bool:
    """Return whether a model reads sounds in its text, which can be encoded apart."""
    try:
        find_sounds(base)
    except PeftfxError:
        return False
    return True


def find_sounds(base: nn.Module) -> Sounds:
    """Return how a model reads sounds. It is found once for a model in a dtype and a size of pictures, as it takes
    several runs.

    Raises:
        PeftfxError: it reads none in its text, or its forward does not take encoded sounds in place of recordings.
    """
    known, key = _known.setdefault(base, {}), (floating_dtype(base), chosen_size())
    if key not in known:
        try:
            known[key] = _find(base)
        except PeftfxError as error:
            known[key] = PeftfxError(error.what, error.where, error.hint)  # without a traceback, which holds the model
    found = known[key]
    if isinstance(found, PeftfxError):
        raise PeftfxError(found.what, found.where, found.hint)
    return found


def _find(base: nn.Module) -> Sounds:
    if why := why_not_heard(base):
        raise PeftfxError(why, type(base).__name__, _HINT)
    made, both = _one_sound(base), heard_and_seen(base)
    encode = sound_encoder(base)
    assert encode is not None  # there is an example
    taken = inspect.signature(encode).parameters
    given = {name: value for name, value in made.items() if name in taken}
    recording = next(name for name in RECORDINGS if name in given)
    masks = tuple(name for name in given if name != recording)
    features = _encoded(base, given)
    if isinstance(features, str):
        what = f"the model's sound encoder does not run by itself: {features}"
        raise PeftfxError(what, type(base).__name__, _HINT)
    shape: list[int | None] = list(given[recording].shape[1:])
    axis = next(
        (i for i in range(len(shape)) if _takes(base, given, recording, i, 2 * (shape[i] or 0), features)), None
    )
    length = given[masks[0]].shape[1] if masks else int(given[recording].shape[1:][-1 if axis is None else axis])
    lengths: tuple[int, ...] = (length,)
    if axis is not None:
        longer = (_LONGER * length + 1, _LONGER * length)
        tried = (*longer, 2 * length)
        lengths = next((n, length) for n in tried if _takes(base, given, recording, axis, n, features))
        shape[axis] = None
    token = first_of(base.config, *SOUND_TOKENS)
    assert isinstance(token, int)  # there is an example
    width, heard = int(features.shape[-1]), given[recording].dtype
    embedded = hears_in_forward(base) and not both
    sounds = Sounds(
        *(token, width, features.dtype, heard, recording, tuple(shape), masks, lengths),
        embedded=embedded,
        handed=both,
        flags=made[masks[0]].dtype if masks else torch.long,
    )
    if both:
        why = why_not_handed(base, _text_with(base, token, features), given, sounds)
    else:
        why = (why_not_embedded if embedded else _why_not_already)(base, made, sounds)
    if why:
        raise PeftfxError(f"the model's forward takes no encoded sounds: {why}", type(base).__name__, _HINT)
    if both:
        return sounds
    return dataclasses.replace(sounds, picks=picking(inspect.signature(base.forward).parameters, taken, recording))


def _text_with(base: nn.Module, token: int, features: Tensor) -> Tensor:
    """Return a text, int64[1, sequence], with a token of text on both sides of those of a sound."""
    pieces = features.shape[0] if isinstance(features.shape[0], int) else 2  # one number is as good as another
    text = example_inputs(base, sizes={"batch": 1, "sequence": 2})["input_ids"][:, -2:]
    return torch.cat((text[:, :1], torch.full((1, pieces), token), text[:, 1:]), 1)


def _encoded(base: nn.Module, given: Mapping[str, Tensor]) -> Tensor | str:
    """Return the features of sounds, encoded on fake tensors; or why the model's code does not run."""
    with fake_run(base) as fake:
        try:
            return encode_sounds(base, {name: fake(value) for name, value in given.items()})
        except Exception as error:  # whatever the model's code raises
            raise_if_memory_is_out(error)
            of_values = "data-dependent" in str(error)
            return f"{_BRANCHES}, at {line_of(error, base)}" if of_values else first_line(error)


def _takes(
    base: nn.Module, given: Mapping[str, Tensor], recording: str, axis: int, length: int, features: Tensor
) -> bool:
    """Return whether the encoder takes recordings of another length along an axis of theirs, with masks as long.

    Where code fills up the pieces of each recording to one number, a recording with more pieces is too long for it.

    Args:
        base: the model.
        given: the arguments of one sound.
        recording: the argument that takes recordings.
        axis: the axis of one recording.
        length: the other length.
        features: what the encoder gives for one sound.
    """
    found = _of_length(base, given, recording, axis, length)
    if found is None:
        return False
    own, pieces = features.shape[0], found.shape[0]
    if not (isinstance(own, int) and isinstance(pieces, int)) or own == pieces:
        return True
    half = _of_length(base, given, recording, axis, given[recording].shape[axis + 1] // 2)
    return half is None or not isinstance(half.shape[0], int) or half.shape[0] != own


def _of_length(base: nn.Module, given: Mapping[str, Tensor], recording: str, axis: int, length: int) -> Tensor | None:
    """Return the features of a recording of another length, with masks as long; None if the encoder takes none."""
    sound, masks = given[recording], {name: value for name, value in given.items() if name != recording}
    if any(mask.shape[1] != sound.shape[axis + 1] for mask in masks.values()):
        return None
    shape = list(sound.shape)
    shape[axis + 1] = length
    longer = {name: torch.ones(1, length, dtype=mask.dtype) for name, mask in masks.items()}
    found = _encoded(base, {recording: sound.new_zeros(shape), **longer})
    return None if isinstance(found, str) else found


def _why_not_already(base: nn.Module, made: Mapping[str, Tensor], sounds: Sounds) -> str:
    """Return why the features of sounds cannot be given to a forward in place of recordings, or nothing.

    The forward must call the encoder once, and run with features alone.
    """
    pieces = int((made["input_ids"] == sounds.token).sum())
    with fake_run(base) as fake:
        given = {name: fake(value) for name, value in made.items()}
        with encoded_already(base, fake(torch.zeros(pieces, sounds.width, dtype=sounds.dtype))) as calls:
            try:
                base(**given)
            except Exception as error:  # whatever the model's code raises
                raise_if_memory_is_out(error)
                return first_line(error)
    return "" if len(calls) == 1 else f"it calls `{ENCODE_SOUND}` {len(calls)} times, not once"
