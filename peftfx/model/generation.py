"""Text generation: transformers' own `generate` on an adapted model, over the graphs of the model's views.

`generate` runs on a model of the base's own class, of which only the forward is replaced. So everything that the class
does for generation (inputs that it prepares, tokens that it suppresses) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from peftfx.bases.processors.writers import writer_of
from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError
from peftfx.generation.over_graphs import over_graphs
from peftfx.generation.step import Generates, Step
from peftfx.generation.step_cross_images import GeneratesOverImages
from peftfx.generation.step_encoder_decoder import GeneratesFromSource, SourceEncoder
from peftfx.generation.step_image_source import GeneratesFromImages
from peftfx.generation.step_images import GeneratesAsWriter, GeneratesWithImages
from peftfx.generation.step_sounds import GeneratesWithImagesAndSounds, GeneratesWithSounds
from peftfx.graph.conditions import unmet
from peftfx.graph.decisions import opposed
from peftfx.graph.graph import Graph
from peftfx.views.encoder_decoder import Decoder
from peftfx.views.finding.cross_images import DecodeOverImages
from peftfx.views.finding.image_source import EncoderWithImages
from peftfx.views.images.encoded import VISION
from peftfx.views.images.views import DecodeWithImages
from peftfx.views.sounds.beside_images import Hears
from peftfx.views.sounds.encoded import AUDIO
from peftfx.views.sounds.views import DecodeWithSounds
from peftfx.views.view import View

GraphOf = Callable[[View, "dict[str, Tensor] | None"], Graph]
"""Returns the adapted graph of a view for inputs of these sizes, or of example inputs (`None`)."""


def generator(base: nn.Module, view_named: Callable[[str], View | None], graph_of: GraphOf) -> Any:
    """Return a model of the base's own class, with the base's own tensors, whose forward is the adapted graph.

    Args:
        base: the model whose class generates.
        view_named: returns the view of a name, as the active adapters change it.
        graph_of: returns the adapted graph of a view. One graph serves steps of one token and of many.

    Raises:
        PeftfxError: the base is not a model that generates text, or has no decode view.
    """
    refuse_no_text(base)
    if not encodes_and_decodes(base):
        decode = view_named("decode")
        if isinstance(decode, DecodeOverImages):
            encode = _runner(view_named(VISION), graph_of)
            return over_graphs(base, GeneratesOverImages, view=decode, step=_runner(decode, graph_of), encode=encode)
        if isinstance(decode, DecodeWithSounds):
            heard = {"encode_sounds": _runner(view_named(AUDIO), graph_of)}
            return over_graphs(base, GeneratesWithSounds, view=decode, step=_runner(decode, graph_of), **heard)
        if not isinstance(decode, DecodeWithImages):
            return over_graphs(base, Generates, view=decode, step=_runner(decode, graph_of))
        writer = writer_of(base)
        way: type[Generates] = GeneratesWithImages if writer is base else GeneratesAsWriter
        own = {"encode": _runner(view_named(VISION), graph_of), "generation_config": writer.generation_config}
        if isinstance(decode, Hears):
            way = GeneratesWithImagesAndSounds
            own["encode_sounds"] = _runner(view_named(AUDIO), graph_of)
        return over_graphs(base, way, view=decode, step=_runner(decode, graph_of), **own)
    encoder, decoder = view_named("encoder"), view_named("decoder")
    assert isinstance(decoder, Decoder)
    encodes = SourceEncoder(_runner(encoder, graph_of), decoder.layers.source)
    parts: dict[str, Any] = {"view": decoder, "step": _runner(decoder, graph_of), "source_encoder": encodes}
    if not isinstance(encoder, EncoderWithImages):
        return over_graphs(base, GeneratesFromSource, **parts)
    encode = _runner(view_named(VISION), graph_of)
    return over_graphs(base, GeneratesFromImages, **parts, encode=encode, images=encoder.images)


def refuse_no_text(base: nn.Module) -> None:
    """Refuse a model that does not generate text.

    Raises:
        PeftfxError: it is such a model.
    """
    if not getattr(base, "can_generate", lambda: False)():
        raise PeftfxError("this model does not generate", type(base).__name__, "only language models do")


def _runner(view: View | None, graph_of: GraphOf) -> Step:
    assert view is not None
    graph = graph_of(view, None)  # the usual graph: sizes at which the model's code branches get another

    def run(inputs: dict[str, Tensor], _: Cache | None) -> dict[str, Tensor]:
        sizes = graph.sizes_of(inputs)
        fits = not unmet(graph.conditions, sizes, edges=False) and not unmet(graph.filled, sizes)
        fits = fits and not opposed(graph.decisions, inputs)
        chosen = graph if fits else graph_of(view, inputs)
        flat = chosen.run(*(inputs[spec.name] for spec in chosen.inputs))
        return dict(zip(chosen.outputs, flat, strict=True))

    return run
