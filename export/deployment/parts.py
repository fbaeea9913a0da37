"""The graphs that a model is served by, each in an `.onnx` file of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from peftfx.bases.processors.readers import SIZED, reads_images, reads_sized_images, why_not_in_source, why_not_read
from peftfx.bases.processors.videos import takes_videos
from peftfx.bases.tasks import HEARING, task_of
from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError, warn
from peftfx.export.verification.comparison import Comparison
from peftfx.export.verification.sizes.limits import Sizes
from peftfx.generation.step import LOGITS_KEPT, refuse_arguments
from peftfx.graph.graph import Graph
from peftfx.graph.slots import Slot
from peftfx.model.adapted import AdaptedModel
from peftfx.options import AUTO, DECODE, FORWARD, check_view
from peftfx.views.finding.cross_images import crosses, why_not_crossed
from peftfx.views.finding.encoder_decoder_layers import find_layers
from peftfx.views.finding.image_views import find_images
from peftfx.views.finding.sound_views import hears
from peftfx.views.finding.video_views import find_videos
from peftfx.views.images.encoded import IMAGE_TOKENS, VISION
from peftfx.views.images.sizes import IMAGES
from peftfx.views.images.videos import FRAMES, VIDEO, VIDEO_PIECES
from peftfx.views.prompt_inputs import Place, WithPromptInputs
from peftfx.views.row_adapters import WithRowAdapters
from peftfx.views.sounds.encoded import AUDIO, AUDIO_TOKENS, SOUNDS
from peftfx.views.view import View, name_axes

#: Axes that must be free if the user gave no size.
FREE = frozenset(
    {
        *(IMAGE_TOKENS, AUDIO_TOKENS, SOUNDS, FRAMES, VIDEO_PIECES, "batch", "sequence", "decoder_sequence"),
        *("encoder_sequence", "encoder_total", "past", "total"),
    }
)

PATCHES = ("flattened_patches", "image_patches", "pixel_values_images")  #: other names of a forward's images


@dataclass(frozen=True)
class GraphPart:
    """A graph on its way to a file, after a stage of the export. Each stage makes a new part.

    Attributes:
        file: the name of the file.
        view: the view of the model that the graph is; None is the forward view.
        graph: the graph as captured, with the adapters in it.
        exported: the graph that is written: the same, or merged.
        slots: the inputs for adapters, filled when the graph runs.
        found: the comparisons of the written model with its reference.
        places: the places of soft prompts, in the forward view.
        sizes: the sizes at which the graph is right.
    """

    file: str
    view: View | None
    graph: Graph
    exported: Graph
    slots: tuple[Slot, ...] = ()
    found: Sequence[Comparison] = ()
    places: tuple[Place, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def seen(self) -> View | None:
        """The view without its inputs for soft prompts and for adapters' numbers."""
        return self.view.view if isinstance(self.view, WithPromptInputs | WithRowAdapters) else self.view

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return self.file.removesuffix(".onnx")


def capture_parts(adapted: AdaptedModel, view: str, inputs: Mapping[str, object] | None) -> list[GraphPart]:
    """Capture the graphs that a model is served by.

    Args:
        adapted: the model, in eval mode.
        view: `forward`; `decode`, which is two graphs for an encoder-decoder; or `auto`, which chooses by the model's
            task.
        inputs: the inputs of a forward call, if the user chose them. Sizes may then be fixed, and `auto` means
            `forward`.

    Raises:
        PeftfxError: the model has no such view, or fixes a size that the user did not choose.
    """
    views = views_of(adapted.base, view, inputs)
    if FORWARD in views.values():
        example = adapted.example if inputs is None else inputs
        graph = adapted.graph(example)
        if inputs is None:
            given = {spec.name: example[spec.name] for spec in graph.inputs if spec.name in example}
            hint = {"hint": SIZED} if reads_sized_images(adapted.base) else {}
            refuse_fixed(graph, name_axes(given), **hint)  # type: ignore[arg-type]
        return [GraphPart("model.onnx", None, graph, graph)]
    refuse_arguments({n: v for n, v in (inputs or {}).items() if n == LOGITS_KEPT or not isinstance(v, Tensor)})
    parts = []
    for file, name in views.items():
        shown = adapted.view(name)
        assert shown is not None
        graph = adapted.graph(view=shown)
        refuse_fixed(graph, shown.axes)
        parts.append(GraphPart(file, shown, graph, graph))
    return parts


def generates(base: nn.Module) -> bool:
    """Say whether the model `base` writes text token by token. Such a model is served with its cache."""
    task = task_of(base)
    if task == HEARING[0] and encodes_and_decodes(base):
        return _finds(find_layers, base)
    return task in ("text-generation", "text2text-generation") and hasattr(base, "generate")


def _finds(find: Callable[[nn.Module], object], base: nn.Module) -> bool:
    """Say whether a model has what `find` looks for, and can so be served as several graphs."""
    try:
        find(base)
    except PeftfxError:
        return False
    return True


def is_forward(base: nn.Module, view: str, inputs: Mapping[str, object] | None) -> bool:
    """Return whether a model is served by its forward in a view; see `capture_parts`.

    Raises:
        PeftfxError: the view does not exist; or it is the forward, or `inputs` are given, and videos are asked for.
    """
    check_view(view)
    forward = view == FORWARD or (view == AUTO and (inputs is not None or not generates(base)))
    if takes_videos() and (forward or inputs is not None):
        what, hint = "a graph of videos goes with one that writes text", "pass --view decode, or leave --videos out"
        raise PeftfxError(what, type(base).__name__, hint)
    return forward


def views_of(base: nn.Module, view: str, inputs: Mapping[str, object] | None) -> dict[str, str]:
    """Return the files that a model is served by in a view, and the view in each file; see `capture_parts`.

    Raises:
        PeftfxError: the view does not exist.
    """
    if is_forward(base, view, inputs):
        return {"model.onnx": FORWARD}
    both = encodes_and_decodes(base)
    files = {"encoder_model.onnx": "encoder", "decoder_model.onnx": "decoder"} if both else {"model.onnx": DECODE}
    accepted = inspect.signature(base.forward).parameters
    sees = any(name in accepted for name in (*IMAGES, *PATCHES)) and not (both and "input_ids" not in accepted)
    why = why_not_in_source(base) if both else why_not_read(base)
    if not why:
        try:
            find_images(base)
        except PeftfxError as error:
            sees, why = True, error.what
    if why and not both and crosses(base):
        why = why_not_crossed(base)
    if why and sees:
        rest = "text alone" if both or not hears(base) else "text with sounds"
        warn(f"images are left out, and {rest} is served: {why}")
    if takes_videos():
        if why or both:
            what = f"videos go beside images: {why or 'this model encodes its text'}"
            raise PeftfxError(what, type(base).__name__, "leave --videos (videos=True) out")
        find_videos(base)  # which says why there can be none
    encoders = {} if why else {"vision_encoder.onnx": VISION}
    if takes_videos():
        encoders["video_encoder.onnx"] = VIDEO
    if not both and hears(base):
        encoders["audio_encoder.onnx"] = AUDIO
    return {**encoders, **files}


def sites_view(base: nn.Module, view: str, *, sized: bool = False) -> str:
    """Return the name of the view to find sites on: the asked view if it has all sites, else `forward`.

    Args:
        base: the model.
        view: the asked view; see `capture_parts`.
        sized: whether a size of images is chosen.
    """
    check_view(view)
    if view == FORWARD or encodes_and_decodes(base) or (view == AUTO and not generates(base)):
        return FORWARD
    if (crosses(base) and not why_not_crossed(base)) or hears(base):
        return FORWARD
    return FORWARD if reads_images(base) and _finds(partial(find_images, of_any_size=sized), base) else DECODE


def refuse_fixed(
    graph: Graph,
    axes: Mapping[str, tuple[str | None, ...]],
    free: Collection[str] = FREE,
    hint: str = "in Python, pass inputs=... of the size you will serve: the model will take that one alone",
) -> None:
    """Refuse a graph in which an axis is fixed at the example's size, which the user did not choose.

    Args:
        graph: the captured graph.
        axes: the names of each input's axes.
        free: the names that must be free.
        hint: what the user can do.
    """
    for spec in graph.inputs:
        for wanted, got in zip(axes.get(spec.name, ()), spec.shape, strict=False):
            if wanted in free and isinstance(got, int):
                line = f", in {line}" if (line := graph.fixed.get(str(wanted))) else ""
                raise PeftfxError(f"the model's code fixes the {wanted}, here at {got}{line}", spec.name, hint)
