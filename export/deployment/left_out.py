"""What a model's class reads beside text, and no exported graph takes: a warning tells of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from torch import nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.sounds.in_forward import heard_and_seen
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.bases.processors.videos import why_no_videos
from peftfx.errors import warn
from peftfx.export.deployment.parts import PATCHES, GraphPart
from peftfx.options import FORWARD
from peftfx.views.finding.sound_views import why_left_out, why_no_sound, why_not_heard

#: What people call each kind of input, by transformers' word, and the arguments that hold it.
_KINDS: Mapping[str, tuple[str, frozenset[str]]] = {
    "image": ("images", frozenset({"pixel_values", *PATCHES, "image_pixel_values"})),
    "audio": ("sounds", frozenset({*RECORDINGS, "audio_values", "audio_input_features"})),
    "video": ("videos", frozenset({"pixel_values_videos"})),
}


def warn_of_left_out(base: nn.Module, parts: Sequence[GraphPart]) -> None:
    """Warn of what the model's class reads, and none of its graphs takes. Views of a cache tell of images themselves.

    Args:
        base: the model.
        parts: the graphs that it is served by.
    """
    taken = {spec.name for part in parts for spec in part.graph.inputs}
    accepted = set(inspect.signature(base.forward).parameters)
    modalities = getattr(base, "input_modalities", None) or ()
    if "input_ids" not in taken or isinstance(modalities, str):
        return
    forward = any(part.seen is None or part.seen.name == FORWARD for part in parts)
    left = [
        word
        for kind, (word, names) in _KINDS.items()
        if kind in modalities and names & accepted and not names & taken and (forward or kind != "image")
    ]
    if left:
        rest = [word for word, names in _KINDS.values() if names & taken]
        served = f"text with {' and '.join(rest)}" if rest else "text alone"
        told = " and ".join(left)
        warn(f"{told} are left out, and {served} is served: {_why(base, left)}")


def _why(base: nn.Module, left: Sequence[str]) -> str:
    """Return why no graph takes these kinds of inputs."""
    if list(left) == ["videos"] and not why_no_videos(base):
        return "pass --videos (videos=True) for them, with --view decode"
    if "sounds" in left and heard_and_seen(base):
        why = why_left_out(base)
        videos = ["pass --videos (videos=True) for videos, with --view decode"] if "videos" in left else []
        return "; ".join([why, *(videos if not why_no_videos(base) else [])])
    made = set(example_inputs(base))
    if all(names & made for word, names in _KINDS.values() if word in left):
        why = why_not_heard(base) or "their encoder does not run apart from the text"
        return f"{why} (the forward view takes them: --view forward)"
    return why_no_sound(base) if list(left) == ["sounds"] else "peftfx makes no example of them beside a text"
