"""Deployment: a way of serving adapters, as what an export does differently for it at each of its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from peftfx.export.deployment.export_json import write_export_json
from peftfx.export.deployment.genai_config import write_genai_config
from peftfx.export.deployment.parts import GraphPart, capture_parts
from peftfx.export.verification.oracle import Oracle, eager_oracle
from peftfx.export.verification.size_trials import sizes_of
from peftfx.export.verification.sizes import Sizes
from peftfx.generation.invocation import InvokedDecode
from peftfx.model.adapted import AdaptedModel
from peftfx.views.decode import Decode
from peftfx.views.images import DecodeWithImages

Inputs = Mapping[str, object]


class Deployment(ABC):
    """A way of serving adapters. What is here is what most of them do."""

    #: Whether active adapters are folded into the weights, where there are any.
    merges: bool = False

    def names(self, adapted: AdaptedModel) -> Sequence[str]:
        """The adapters that are in the graphs."""
        return adapted.active

    @abstractmethod
    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[GraphPart]:
        """The graphs to write; see `capture_parts`."""

    def finish(self, adapted: AdaptedModel, part: GraphPart, program: ir.Model) -> tuple[GraphPart, ir.Model]:
        """A part and its program as it is written."""
        return part, program

    def oracle(self, adapted: AdaptedModel, part: GraphPart, example: Inputs) -> Oracle:
        """What the part is held against, and in which calls."""
        return eager_oracle(adapted, part.graph, part.view, example, part.sizes)

    def sizes(self, adapted: AdaptedModel, part: GraphPart, example: Inputs, allow_fixed: bool) -> Sizes:
        """Where the part is right: where the model that it is a view of is.

        Raises:
            PeftfxError: for sizes on one side of a branch in the model's code alone; not with `allow_fixed`.
        """
        return sizes_of(adapted, part.seen, example, allow_fixed=allow_fixed)

    def describe(self, directory: Path, adapted: AdaptedModel, parts: Sequence[GraphPart], example: Inputs) -> None:
        """Tell other runtimes, beside the models, how they are served."""
        for part in parts:
            if isinstance(part.seen, InvokedDecode | DecodeWithImages):
                continue  # other runtimes know nothing of where a row invokes an adapter, or of images beside a text
            if isinstance(part.seen, Decode):
                _, entry = adapted.under_prompt(part.seen)
                write_genai_config(directory, adapted.base.config, part.seen, 0 if entry is None else entry.shape[0])
            elif part.seen is None:
                write_export_json(directory, part.file, part.exported, adapted.base, example)


@dataclass(frozen=True)
class InGraph(Deployment):
    """The active adapters in the graph: merged, or apart as initializers under their own names."""

    merges: bool = True

    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[GraphPart]:
        return capture_parts(adapted, view, inputs)
