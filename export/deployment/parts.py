"""Parts: the graphs that a model is served by, each in an `.onnx` file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from peftfx.bases.tasks import HEARING, task_of
from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError, warn
from peftfx.export.verification.comparison import Comparison
from peftfx.export.verification.sizes import Sizes
from peftfx.graph.graph import Graph
from peftfx.graph.slots import Slot
from peftfx.model.adapted import AdaptedModel
from peftfx.options import AUTO, DECODE, FORWARD, check_view
from peftfx.views.finding.encoder_decoder_layers import find_layers
from peftfx.views.finding.image_views import find_images, reads_images
from peftfx.views.images import IMAGE_TOKENS, VISION
from peftfx.views.prompt_inputs import Place, WithPromptInputs
from peftfx.views.row_adapters import WithRowAdapters
from peftfx.views.view import View, name_axes

#: Axes that have to be free where nobody gave a size.
FREE = frozenset(
    {IMAGE_TOKENS, "batch", "sequence", "decoder_sequence", "encoder_sequence", "encoder_total", "past", "total"}
)


@dataclass(frozen=True)
class GraphPart:
    """A graph on its way to a file, as it is after a stage of the export: the next one makes another of it.

    Attributes:
        file: its name.
        view: what the graph is a view of; None is the forward.
        graph: as captured, with the adapters in it.
        exported: what is written: the same, or merged.
        slots: where adapters can be put when it runs.
        found: how what was written compares.
        places: of soft prompts, in a forward.
        sizes: where it is right.
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
        """The view without places for soft prompts, and without the numbers of adapters."""
        return self.view.view if isinstance(self.view, WithPromptInputs | WithRowAdapters) else self.view

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return self.file.removesuffix(".onnx")


def capture_parts(adapted: AdaptedModel, view: str, inputs: Mapping[str, object] | None) -> list[GraphPart]:
    """Capture what a model is served by.

    Args:
        adapted: in eval mode.
        view: `forward`, or `decode`, which is two graphs for an encoder-decoder, or `auto`: by the model's task.
        inputs: of a forward call, where they were chosen: sizes may be fixed, and `auto` is `forward`.

    Raises:
        PeftfxError: the model has no such view, or fixes a size that nobody chose.
    """
    views = views_of(adapted.base, view, inputs)
    if FORWARD in views.values():
        example = adapted.example if inputs is None else inputs
        graph = adapted.graph(example)
        if inputs is None:
            given = {spec.name: example[spec.name] for spec in graph.inputs if spec.name in example}
            refuse_fixed(graph, name_axes(given))  # type: ignore[arg-type]
        return [GraphPart("model.onnx", None, graph, graph)]
    parts = []
    for file, name in views.items():
        shown = adapted.view(name)
        assert shown is not None
        graph = adapted.graph(view=shown)
        refuse_fixed(graph, shown.axes)
        parts.append(GraphPart(file, shown, graph, graph))
    return parts


def generates(base: nn.Module) -> bool:
    """Whether the model is one that writes text token by token: such a one is served with its cache."""
    task = task_of(base)
    if task == HEARING[0] and encodes_and_decodes(base):
        return _splits(base)
    return task in ("text-generation", "text2text-generation") and hasattr(base, "generate")


def _splits(base: nn.Module) -> bool:
    """Whether an encoder-decoder can be served as two graphs."""
    try:
        find_layers(base)
    except PeftfxError:
        return False
    return True


def views_of(base: nn.Module, view: str, inputs: Mapping[str, object] | None) -> dict[str, str]:
    """The files that a model is served by in a view, and the view that each holds; see `capture_parts`.

    Raises:
        PeftfxError: there is no such view.
    """
    check_view(view)
    if view == FORWARD or (view == AUTO and (inputs is not None or not generates(base))):
        return {"model.onnx": FORWARD}
    if encodes_and_decodes(base):
        return {"encoder_model.onnx": "encoder", "decoder_model.onnx": "decoder"}
    if not reads_images(base):
        return {"model.onnx": DECODE}
    try:
        find_images(base)
    except PeftfxError as error:
        warn(f"images are left out, and text alone is served: {error.what}")
        return {"model.onnx": DECODE}
    return {"vision_encoder.onnx": VISION, "model.onnx": DECODE}


def without_images(views: dict[str, str]) -> dict[str, str]:
    """These views.

    Raises:
        PeftfxError: one is of images, beside which adapters cannot be put or chosen.
    """
    if VISION in views.values():
        what = "adapters are swapped and chosen by row in models of text alone, and this one reads images"
        raise PeftfxError(what, VISION, "export it merged, or in its forward view")
    return views


def refuse_fixed(graph: Graph, axes: Mapping[str, tuple[str | None, ...]]) -> None:
    """A batch or sequence of the example's size, which nobody chose, would serve nobody."""
    for spec in graph.inputs:
        for wanted, got in zip(axes.get(spec.name, ()), spec.shape, strict=False):
            if wanted in FREE and isinstance(got, int):
                hint = "pass inputs=... of the size you will serve: the model will take that one alone"
                raise PeftfxError(f"the model's code fixes the {wanted}, here at {got}", spec.name, hint)
