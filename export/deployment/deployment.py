"""The ways of serving adapters, and what an export does differently for each way at each of its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from transformers.exporters.base import EXPORT_MANIFEST_FILE

from peftfx.errors import PeftfxError
from peftfx.export.deployment.export_json import write_export_json
from peftfx.export.deployment.genai_config import GENAI_CONFIG, write_genai_config
from peftfx.export.deployment.image_parts import capture_with_images
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.oracle import Oracle, eager_oracle, named_in
from peftfx.export.verification.sizes.limits import Sizes
from peftfx.export.verification.sizes.search import sizes_of
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export.verification.without_rounding import CodeAndGraph, graph_of
from peftfx.generation.invocation import InvokedDecode
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.adaptation.remove import Remove
from peftfx.views.decode import Decode
from peftfx.views.finding.cross_images import DecodeOverImages
from peftfx.views.finding.image_forward import ForwardWithImages
from peftfx.views.written_features import DecodeWithFeatures

Inputs = Mapping[str, object]


class Deployment(ABC):
    """A way of serving adapters. The defaults are what most ways do."""

    #: Whether active adapters are folded into the weights.
    merges: bool = False

    def names(self, adapted: AdaptedModel) -> Sequence[str]:
        """Return the names of the adapters that are in the graphs."""
        return adapted.active

    @abstractmethod
    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[GraphPart]:
        """Capture the graphs to write; see `capture_parts`."""

    def finish(self, adapted: AdaptedModel, part: GraphPart, program: ir.Model) -> tuple[GraphPart, ir.Model]:
        """Return the part and its ONNX program in their final form, as they are written."""
        return part, program

    def oracle(self, adapted: AdaptedModel, part: GraphPart, example: Inputs) -> Oracle:
        """Return the oracle that the part is compared with, and the calls to compare."""
        return eager_oracle(adapted, part.graph, part.view, example, part.sizes)

    def captured(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> CodeAndGraph:
        """Return the model's own code and the part's graph as captured, which have to give the same for a call."""
        return CodeAndGraph(oracle.reference, graph_of(part.graph))

    def bare(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> CodeAndGraph | None:
        """Return the model's own code and its graph, both without adapters. None if soft prompts are in the graph."""
        if adapted.entry() is not None:
            return None
        graph = Remove()(part.graph).graph
        own = named_in(graph, EagerReference(adapted, part.seen, example))

        def run(feed: Tensors) -> Tensors:
            with adapted.named.acting_as(()):
                return own(feed)

        return CodeAndGraph(run, graph_of(graph))

    def cause(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> PeftfxError | None:
        """Return why a part cannot be what it is compared with, if torch alone shows that; otherwise None."""
        return None

    def sizes(
        self, adapted: AdaptedModel, part: GraphPart, example: Inputs, allow_fixed: bool, *, brief: bool = False
    ) -> Sizes:
        """Return the sizes at which the part is right: those at which the viewed model is right; see `sizes_of`.

        Raises:
            PeftfxError: the graph is right only on one side of a branch in the model's code; not with `allow_fixed`.
        """
        return sizes_of(adapted, part.seen, example, allow_fixed=allow_fixed, brief=brief)

    def describe(
        self, directory: Path, adapted: AdaptedModel, parts: Sequence[GraphPart], example: Inputs
    ) -> dict[str, str]:
        """Write files beside the models that tell other runtimes how to serve them.

        Return why a file was not written, by its name.
        """
        why: dict[str, str] = {}
        for part in parts:
            if isinstance(part.seen, InvokedDecode):
                why[GENAI_CONFIG] = "rows say where they invoke an adapter, and GenAI has no such input"
            elif isinstance(part.seen, DecodeWithFeatures | DecodeOverImages):
                why[GENAI_CONFIG] = "the decoder takes features of images or sounds, which GenAI knows by architecture"
            elif isinstance(part.seen, Decode):
                _, entry = adapted.under_prompt(part.seen)
                ahead = 0 if entry is None else entry.shape[0]
                why[GENAI_CONFIG] = write_genai_config(directory, adapted.base.config, part.seen, ahead)
            elif part.seen is None or isinstance(part.seen, ForwardWithImages):
                given = example if part.seen is None else part.seen.inputs(adapted.base)
                reason = write_export_json(directory, part.file, part.exported, adapted.base, given)
                why[EXPORT_MANIFEST_FILE] = reason
        return {file: reason for file, reason in why.items() if reason}


@dataclass(frozen=True)
class InGraph(Deployment):
    """The active adapters are in the graph: merged, or as initializers under their own names."""

    merges: bool = True

    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[GraphPart]:
        return capture_with_images(adapted, view, inputs)
