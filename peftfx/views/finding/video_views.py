"""Finds how a model of text and videos reads videos: by what its processor makes of them, and runs of its encoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.processors.encoded_images import FoundFeatures, by_image, joined_features
from peftfx.bases.processors.image_size import Size
from peftfx.bases.processors.pictures import chosen_size, told_size
from peftfx.bases.processors.token_types import reads_types
from peftfx.bases.processors.videos import ENCODE_VIDEO, VIDEO_TOKENS, video_of, why_no_videos
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.graph.contexts import unchanged
from peftfx.graph.decisions import has_values
from peftfx.views.finding.image_views import are_apart, encoded_on_fakes
from peftfx.views.images.videos import Videos

_FEW, _MORE = 2, 4  #: numbers of frames whose examples are compared
_PLACES = "get_placeholder_mask"  #: transformers' name of the function that finds the places of features
_WHERE = "leave --videos (videos=True) out: texts are then served with images"


def find_videos(base: nn.Module) -> Videos:
    """Return how a model reads videos.

    Raises:
        PeftfxError: it reads none, no example is known, or its video encoder does not run by itself.
    """
    if why := why_no_videos(base):
        raise PeftfxError(why, type(base).__name__, _WHERE)
    if reads_types(base):
        what = "the model's attention depends on the types of tokens, and peftfx knows those of images alone"
        raise PeftfxError(what, type(base).__name__, _WHERE)
    token, size = first_of(base.config, *VIDEO_TOKENS), told_size(base)
    if not isinstance(token, int):
        raise PeftfxError("the model's config names no video token", type(base).__name__, _WHERE)
    if size is None:
        what = "neither the model's config nor a processor beside it tells the size of frames"
        raise PeftfxError(what, type(base).__name__, "pass --image-size HEIGHTxWIDTH (image_size=)")
    few, more = (_example(base, frames, size) for frames in (_FEW, _MORE))
    counted, place, slices = _counted(few, more)
    if not counted and few.keys() == more.keys() and any(value.ndim < 3 for value in few.values()):
        what = f"nothing tells how many frames a video has, from {', '.join(few)}"
        raise PeftfxError(what, type(base).__name__, _WHERE)
    one = _slices(few, counted, place, slices)[0] if counted else few
    if counted and not _apart(base, _slices(more, counted, place, 2 * slices), more):
        what = "the features of a slice of a video depend on the other slices"
        raise PeftfxError(what, type(base).__name__, _WHERE)
    output, fixed, reads = encoded_on_fakes(base, one, ENCODE_VIDEO)
    found = FoundFeatures.of(output)
    if not _has_place(base, token, int(found.first.shape[-1])):
        what = "the model's code finds no video at the video token of its config"
        raise PeftfxError(what, type(base).__name__, _WHERE)
    known = {value.name for value in fixed}
    if counted and counted not in known:
        raise PeftfxError(f"the model's code reads no numbers of {counted}", type(base).__name__, _WHERE)
    return Videos(
        token,
        found.width,
        found.first.dtype,
        each=None,
        listed=found.listed,
        inputs=tuple((name, tuple(value.shape)) for name, value in one.items() if name not in known),
        fixed=fixed,
        reads=reads,
        deeper=found.deeper,
        picture=chosen_size() or (),
        field=found.field,
        idle=found.idle,
        counted=counted,
        place=place,
        axes=found.first.ndim,
    )


def _has_place(base: nn.Module, token: int, width: int) -> bool:
    """Return whether the model's code finds the place of a video's piece in a text with the video token.

    The code of some models, which take images or videos, finds both at the token of images.
    """
    find = getattr(base.base_model, _PLACES, None)
    if find is None:  # this is seen when the graph is compared
        return True
    ids, embedded = torch.tensor([[token]]), torch.zeros(1, 1, width)
    try:
        find(ids, inputs_embeds=embedded, video_features=embedded[0])
    except Exception as error:
        raise_if_memory_is_out(error)
        return False
    return True


def _example(base: nn.Module, frames: int, size: Size) -> dict[str, Tensor]:
    accepted = inspect.signature(getattr(base.base_model, ENCODE_VIDEO)).parameters
    return {name: value for name, value in video_of(base, frames, size).items() if name in accepted}


def _counted(few: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """Return the argument with the number of slices, the place of that number, and the number for few frames.

    Twice as many frames double one number, and the first axis of what holds pixels.
    """
    for name, value in few.items():
        other = more.get(name)
        if value.is_floating_point() or other is None or other.shape != value.shape or value.ndim != 2:
            continue
        changed = (value[0] != other[0]).nonzero().flatten().tolist()
        if len(changed) == 1 and int(other[0, changed[0]]) == 2 * int(value[0, changed[0]]):
            return name, changed[0], int(value[0, changed[0]])
    return "", 0, 0


def _slices(video: Mapping[str, Tensor], counted: str, place: int, count: int) -> list[dict[str, Tensor]]:
    """Return the arguments of each slice of a video."""
    told = video[counted].clone()
    told[:, place] = 1
    parts = {n: v.chunk(count) if v.is_floating_point() else [v] * count for n, v in video.items()}
    return [{**{n: values[i] for n, values in parts.items()}, counted: told} for i in range(count)]


def _apart(base: nn.Module, slices: list[dict[str, Tensor]], video: Mapping[str, Tensor]) -> bool:
    """Return whether the model's code gives each slice of a video the features that it has alone."""
    if any(not has_values(p) for p in base.parameters()):
        return True
    encode = getattr(base.base_model, ENCODE_VIDEO)
    some = next(base.parameters())
    try:
        with unchanged(base), torch.no_grad():
            calls = ({n: v.to(some.device) for n, v in call.items()} for call in (*slices, video))
            made = [encode(**call, return_dict=True) for call in calls]
    except Exception as error:
        raise_if_memory_is_out(error)
        raise PeftfxError(
            f"the model's video encoder does not run by itself: {first_line(error)}", type(base).__name__, _WHERE
        ) from error
    *alone, together = (torch.cat(by_image(joined_features(output))) for output in made)
    return are_apart(alone, together)
