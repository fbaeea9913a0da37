"""Export one graph in which each row of a batch uses an adapter of its own, chosen by a number in an input.

The adapters are constants of the graph. At each layer, the adapters' tensors are stacked, with ranks padded with zeros
to the largest, and each row takes its own entry. Soft prompts are padded to the longest, and masked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftfx.bases.processors.readers import reads_images
from peftfx.bases.processors.token_types import plain_type
from peftfx.contract.sequence import size_of
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.export.deployment.deployment import Deployment, Inputs
from peftfx.export.deployment.image_parts import capture_with_images
from peftfx.export.deployment.parts import GraphPart, capture_parts, refuse_fixed, views_of
from peftfx.export.slots.adapter_tensors import AdapterTensors, ahead, unrounded_prefix
from peftfx.export.slots.encoders import ENCODED_APART, encoder_by_row
from peftfx.export.slots.row_references import (
    chooses_by_row,
    covering,
    each_under_its_own,
    encodes_apart,
    mixed_in,
    model_alone,
    with_ids,
)
from peftfx.export.slots.row_stacks import stacks_of_rows, told
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.reference import EagerReference, no_oracle
from peftfx.export.verification.oracle import Oracle, Remembered, measured_of
from peftfx.export.verification.probes import probes, view_cases
from peftfx.export.verification.sizes.limits import Sizes
from peftfx.export.verification.without_rounding import CodeAndGraph, graph_of
from peftfx.formats import BATCHED, with_version
from peftfx.graph.graph import Graph
from peftfx.graph.slots import PREFIX, SLOT_PROMPT
from peftfx.model.adapted import AdaptedModel
from peftfx.options import DECODE, FORWARD
from peftfx.passes.slots.by_row import PROMPTS_AT, ByRow, with_exact_stacks
from peftfx.views.arguments import named_tensors
from peftfx.views.capturing.settling import close
from peftfx.views.decode import Decode
from peftfx.views.encoder_decoder import Decoder, Encoder
from peftfx.views.entry import VirtualTokens
from peftfx.views.finding.cross_images import DecodeOverImages
from peftfx.views.forward_axes import WRITTEN
from peftfx.views.row_adapters import IDS, PromptsByRow, WithRowAdapters
from peftfx.views.view import View, name_axes

_ELSE = "export it merged, or with --swappable"
_SOFT = (("", PREFIX), ("", SLOT_PROMPT))  #: the places of soft prompts


@dataclass(frozen=True)
class Batched(Deployment):
    """The graph of a model in which each row chooses among the `adapters`."""

    adapters: tuple[str, ...] = ()

    def names(self, adapted: AdaptedModel) -> Sequence[str]:
        return self.adapters

    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[GraphPart]:
        """Capture the base, and add the choice of an adapter for each row.

        Raises:
            PeftfxError: an adapter does something that cannot differ between rows.
        """
        base = adapted.base
        views = views_of(base, view, inputs)
        each = [told(adapted, name, decodes=DECODE in views.values()) for name in self.adapters]
        lengths = (0, *(len(next((own[p] for p in _SOFT if p in own), ())) for own in each))
        if DECODE not in views.values() and any(("", PREFIX) in own for own in each):
            what = "each row can have its own prefix only in a decoder whose positions are inputs"
            raise PeftfxError(what, type(base).__name__, "export the adapter merged, or swappable")
        prompts = _prompts(adapted, self.adapters, lengths)
        parts = []
        with adapted.disable_adapter():
            stacks, kinds = stacks_of_rows(adapted, each)
            by_row = ByRow(stacks, adapted.sites.headed, kinds)
            for file, name in views.items():
                shown = adapted.view(name)
                if shown is not None and name in ENCODED_APART:
                    parts.append(encoder_by_row(adapted, file, shown, by_row, _ELSE))
                    continue
                if shown is None:
                    part = _forward(adapted, inputs, prompts)
                else:
                    part = _generating(adapted, file, shown, lengths, prompts)
                try:
                    graph = by_row(part.graph).graph
                except PeftfxError:
                    if not any(axis in map(str, spec.shape) for spec in part.graph.inputs for axis in WRITTEN):
                        raise
                    graph = by_row(_paired(adapted, inputs, prompts)).graph
                parts.append(dataclasses.replace(part, graph=graph, exported=graph))
        return parts

    def oracle(self, adapted: AdaptedModel, part: GraphPart, example: Inputs) -> Oracle:
        """Make the oracle: each row equals the model with only that row's adapter. Some rows have no adapter."""
        by_row = chooses_by_row(part)
        alone = [Remembered(model_alone(adapted, part, names, example)) for names in self._acting(part)]
        with adapted.disable_adapter():
            if part.view is not None and part.seen is not None:
                cases = view_cases(
                    adapted, part.view, lambda view, feed: EagerReference(adapted, view)(feed), part.sizes
                )
            else:
                specs = [s for s in part.graph.inputs if s.name != IDS]
                cases = probes(adapted, specs, example, alone[-1].first, part.sizes)
        if part.view is None or part.seen is None:
            cases = [case for case in cases if self._takes(adapted, alone, case, example)]
        if not cases:
            what = "no call was found that the model's own code can run with every one of the adapters"
            raise PeftfxError(what, ", ".join(self.adapters), "leave out adapters that do not run on this base")
        if not by_row:
            measured = measured_of(adapted, cases, part.graph)
            return Oracle(alone[-1], cases, measured, "the model's own code, without adapters")
        if encodes_apart(part):  # one adapter acts in the whole call
            numbers = range(-1, len(self.adapters))
            cases = [{**case, IDS: torch.tensor([number])} for case in cases for number in numbers]
        else:
            cases = with_ids(part.graph, cases, len(self.adapters))
        told = "each row alone with its adapter, by the model's own code with the adapter on its modules"
        for name in self.adapters:
            with adapted.named.acting_as((name,)):
                why = no_oracle(adapted)
            told = f"each row alone with its adapter, by its graph: {why}" if why else told
        reference = each_under_its_own(part, alone)
        return Oracle(reference, cases, measured_of(adapted, cases, part.graph), told, rows=covering(cases))

    def captured(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> CodeAndGraph:
        """Return each row alone, by the model's own code, and the graph, in which the adapters are not yet rounded."""
        prefixes = self._prefixes(adapted) if f"{PROMPTS_AT}.{PREFIX}" in part.graph.derived else None
        rounded = CodeAndGraph(oracle.reference, graph_of(part.graph))
        if not chooses_by_row(part):
            return rounded
        exact = dataclasses.replace(part, graph=with_exact_stacks(part.graph, {PREFIX: prefixes}))
        alone = [model_alone(adapted, part, names, example) for names in self._acting(part)]
        return CodeAndGraph(each_under_its_own(exact, alone), graph_of(exact.graph), rounded)

    def bare(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> None:
        """Return nothing: rows that choose adapters have operations of their own."""

    def cause(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> PeftfxError | None:
        if not chooses_by_row(part) or encodes_apart(part):
            return None
        mixed = mixed_in(part, model_alone(adapted, part, (), example), oracle.largest, close(adapted.base))
        return PeftfxError(mixed, type(adapted.base).__name__, _ELSE) if mixed else None

    def _acting(self, part: GraphPart) -> list[tuple[str, ...]]:
        """Return the adapters that act on a row, for each number of one, and last for none."""
        return [*((name,) for name in self.adapters if chooses_by_row(part)), ()]

    def _prefixes(self, adapted: AdaptedModel) -> Tensor | None:
        """Return the stack of prefixes with those of virtual tokens in float64; None if no adapter has these."""
        each, found = list[AdapterTensors](), False
        for name in self.adapters:
            with adapted.named.acting_as((name,)):
                exact = unrounded_prefix(adapted)
                own = ahead(adapted, decodes=True) if exact is None else {("", PREFIX): exact}
            each, found = [*each, own], found or exact is not None
        return stacks_of_rows(adapted, each)[0]["", PREFIX] if found else None

    def _takes(
        self, adapted: AdaptedModel, alone: Sequence[Remembered], case: dict[str, Tensor], example: Inputs
    ) -> bool:
        """Say whether the model takes a call under each adapter. Its longest text leaves no room for virtual tokens."""
        try:
            for name, reference in zip(self.adapters, alone, strict=False):
                with adapted.named.acting_as((name,)):
                    accepts = EagerReference(adapted, None, example) if no_oracle(adapted) else reference.first
                    accepts(case)
        except VerificationError:
            raise
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            return False
        return True

    def sizes(
        self, adapted: AdaptedModel, part: GraphPart, example: Inputs, allow_fixed: bool, *, brief: bool = False
    ) -> Sizes:
        """Return the sizes at which the model without adapters is right, and all rows with the longest soft prompt."""
        with adapted.disable_adapter():
            found = super().sizes(adapted, part, example, allow_fixed, brief=brief)
        return found.carried(part.graph.conditions, lambda a, b: (a.where, a.axes) == (b.where, b.axes))

    def describe(
        self, directory: Path, adapted: AdaptedModel, parts: Sequence[GraphPart], example: Inputs
    ) -> dict[str, str]:
        """Write which number chooses which adapter. Other runtimes do not know the input `adapter_ids`."""
        told = json.dumps(with_version(BATCHED, {"adapters": list(self.adapters)}), indent=1)
        (directory / BATCHED).write_text(f"{told}\n", encoding="utf-8")
        return {}


def _prompts(adapted: AdaptedModel, names: Sequence[str], lengths: tuple[int, ...]) -> PromptsByRow | None:
    """Return the entry that puts virtual tokens before each row's text, or None if no adapter has virtual tokens."""
    for name in names:
        with adapted.named.acting_as((name,)):
            entry = adapted.entry()
        if isinstance(entry, VirtualTokens):
            shape, own = (len(lengths), max(lengths), entry.shape[1]), size_of(adapted.base, "pad_token_id")
            given = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
            padding = entry.filler if own is None else own
            return PromptsByRow(**{**given, "shape": shape}, lengths=lengths, padding=padding)
    return None


def _forward(adapted: AdaptedModel, inputs: Inputs | None, prompts: PromptsByRow | None) -> GraphPart:
    """Capture the forward view, with each row's own virtual tokens.

    Raises:
        PeftfxError: the model's code takes images one after the other, so nothing tells the row that one is in.
    """
    try:
        (part,) = capture_parts(adapted, FORWARD, inputs)
    except PeftfxError as error:
        if inputs is not None or not reads_images(adapted.base):
            raise
        capture_with_images(adapted, FORWARD, inputs)  # this raises the error again if there is no such graph
        what = "the graph of this model takes any number of images, and nothing says which row each image is in"
        raise PeftfxError(what, type(adapted.base).__name__, _ELSE) from error
    if prompts is None:
        return part
    graph = adapted.graphs.captured(_example(adapted, inputs, prompts), prompts)
    return dataclasses.replace(part, graph=graph, exported=graph)


def _generating(
    adapted: AdaptedModel, file: str, view: View, lengths: tuple[int, ...], prompts: PromptsByRow | None
) -> GraphPart:
    """Capture a view that generates, with each row's own soft prompt.

    Args:
        adapted: the model.
        file: the name of the graph's file.
        view: the view.
        lengths: the length of the soft prompt that each number chooses; the first is for none.
        prompts: puts virtual tokens before each row's text.

    Raises:
        PeftfxError: an adapter has a soft prompt, and the cache has keys and values of images.
    """
    assert isinstance(view, Decode | Encoder | Decoder)
    if any(lengths) and isinstance(view, DecodeOverImages):
        what = "a soft prompt has no place in a cache with keys and values of images"
        hint = "leave it out of the adapters, or use the forward view"
        raise PeftfxError(what, type(adapted.base).__name__, hint)
    rowwise = WithRowAdapters.of(view, lengths, prompts, plain_type(adapted.base))
    graph = adapted.graphs.captured(rowwise.inputs(adapted.base), rowwise.entry, rowwise)
    refuse_fixed(graph, rowwise.axes)
    return GraphPart(file, rowwise, graph, graph)


def _paired(adapted: AdaptedModel, inputs: Inputs | None, prompts: PromptsByRow | None) -> Graph:
    """Capture the forward with one image for each text: the image encoder's adapters are those of the image's row."""
    example = _example(adapted, inputs, prompts)
    return adapted.graphs.capture_with(example, name_axes(named_tensors(example)), prompts)


def _example(adapted: AdaptedModel, inputs: Inputs | None, prompts: PromptsByRow | None) -> Inputs:
    """Return the inputs of a call, with adapters' numbers if rows have virtual tokens."""
    example = adapted.example if inputs is None else inputs
    if prompts is None:
        return example
    tensors = named_tensors(example)
    rows = len(tensors.get("input_ids", next(iter(tensors.values()))))  # a call may have images of another number
    return {**example, IDS: torch.full((rows,), -1)}
