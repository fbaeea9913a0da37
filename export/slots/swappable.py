"""Export one graph of a base model with slots, into which adapters are put when the graph runs.

An initializer that is also an input may be left out of a call. It then has the value in the file, which is empty, or
ones, and gives the base model. ONNX Runtime's `.onnx_adapter` files hold named tensors that replace these values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.deployment.deployment import Deployment, Inputs
from peftfx.export.deployment.image_parts import capture_with_images
from peftfx.export.deployment.parts import GraphPart, refuse_fixed, views_of
from peftfx.export.slots.initializers import neutral_of, open_initializers
from peftfx.export.slots.prompt_places import find_forward, hold_forward, prompt_places_of
from peftfx.export.verification.captured import hold_view
from peftfx.export.verification.cases import is_large
from peftfx.export.verification.comparison import VerificationError, reference_of
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.oracle import Oracle, measured_of, named_in
from peftfx.export.verification.probes import probes, view_cases
from peftfx.export.verification.sizes.limits import Sizes
from peftfx.export.verification.without_rounding import CodeAndGraph, graph_of
from peftfx.export_options.values import Slots
from peftfx.graph.fingerprint import VERSION, fingerprint
from peftfx.graph.slots import INNER, OUTER, PREFIX, SLOT_OWN, Manifest, Slot
from peftfx.model.adapted import AdaptedModel
from peftfx.options import FORWARD
from peftfx.passes.slots.open import Open, slots_of
from peftfx.sites.site import WEIGHT_KINDS, plays
from peftfx.sites.target import select
from peftfx.views.arguments import nested
from peftfx.views.decode import Decode
from peftfx.views.encoder_decoder import Decoder, Encoder
from peftfx.views.finding.cross_images import DecodeOverImages
from peftfx.views.prompt_inputs import Place, WithPromptInputs
from peftfx.views.view import View

#: The roles of layers whose input IA3 scales. HF PEFT picks them by module name; for BERT these are both modules that
#: end in `output.dense`.
SCALED = ("mlp.down", "attention.output")


@dataclass(frozen=True)
class Swappable(Deployment):
    """The graph of a model without adapters, with open slots.

    Attributes:
        slots: which slots to open.
        source: where the base was read from; may be empty.
        atol, rtol: the tolerances of the verification, also for adapters later; None means measured.
        rounds: whether weights are rounded.
        image_size: the height and width of images, or `any`, if they were chosen.
    """

    slots: Slots = field(default_factory=Slots)
    source: str = ""
    atol: float | None = None
    rtol: float | None = None
    rounds: bool = False
    image_size: tuple[int, int] | Literal["any"] | None = None

    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[GraphPart]:
        """Capture the base and open its slots.

        Each targeted site gets slots for a low-rank sum and for a scale of its output. A site with a role in `SCALED`
        also gets a slot for a scale of its input. There are slots for soft prompts before the text, and for keys and
        values beside each attention.

        Raises:
            PeftfxError: the model has adapters.
        """
        if adapted.active:
            hint = "remove the adapters, and write each to a file of its own (export-adapter)"
            raise PeftfxError(
                "a graph for swappable adapters is made from the base only", ", ".join(adapted.active), hint
            )
        base = adapted.base
        views = views_of(base, view, inputs)
        places = tuple(prompt_places_of(base, adapted.sites)) if self.slots.prefix else ()
        parts = [
            forward_part(adapted, inputs, places)
            if name == FORWARD
            else generating_part(adapted, file, name, places, prompts=self.slots.prefix)
            for file, name in views.items()
        ]
        return [_opened(adapted, part, self.slots.target) for part in parts]

    def finish(self, adapted: AdaptedModel, part: GraphPart, program: ir.Model) -> tuple[GraphPart, ir.Model]:
        """Return the part with all its slots, and the program, whose slots may be left out of a call."""
        slots = open_initializers(program, part.slots, adapted.base, part.graph.sites)
        return dataclasses.replace(part, slots=slots), program

    def sizes(
        self, adapted: AdaptedModel, part: GraphPart, example: Inputs, allow_fixed: bool, *, brief: bool = False
    ) -> Sizes:
        """Return the sizes at which the part is right: virtual tokens and those of a text count as one text."""
        found = super().sizes(adapted, part, example, allow_fixed, brief=brief)
        places = {*(place.what for place in part.places), PREFIX}
        return found.carried(part.graph.conditions, lambda a, b: a.where == b.where and not places.isdisjoint(b.axes))

    def oracle(self, adapted: AdaptedModel, part: GraphPart, example: Inputs) -> Oracle:
        """Make the oracle: the graph with random tensors in its slots. With empty slots, the model's own code."""
        cases = self._cases(adapted, part, example)
        told = "the graph with random tensors in its slots; without them, the model's own code"
        layers = frozenset(slot.name for slot in slots_of(part.graph, adapted.sites.headed))
        return Oracle(reference_of(part.graph), cases, measured_of(adapted, cases, part.graph), told, empty=layers)

    def captured(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> CodeAndGraph:
        """Return the model's own code and the graph with empty slots; with soft prompts, where a view has them."""
        view, graph = part.view, graph_of(part.graph)
        own = named_in(part.graph, EagerReference(adapted, view, example))
        kept = {place.what for place in view.places} if isinstance(view, WithPromptInputs) else set()
        empty = {s.name: neutral_of(s) for s in part.slots if s.what != SLOT_OWN and s.name not in kept}
        return CodeAndGraph(
            lambda feed: own({name: value for name, value in feed.items() if name not in empty}),
            lambda feed: graph({**feed, **empty}),
        )

    def bare(self, adapted: AdaptedModel, part: GraphPart, oracle: Oracle, example: Inputs) -> CodeAndGraph:
        return self.captured(adapted, part, oracle, example)

    def _cases(self, adapted: AdaptedModel, part: GraphPart, example: Inputs) -> list[dict[str, Tensor]]:
        """Make calls with tensors in each slot."""
        if part.view is not None:
            made = view_cases(adapted, part.view, lambda view, feed: EagerReference(adapted, view)(feed), part.sizes)
            empty = {slot.name: neutral_of(slot) for slot in part.slots}
            # A text as long as the graph is right for leaves no room for virtual tokens.
            cases = [c for c in made if part.sizes.allow(part.graph.sizes_of({**empty, **c}))]
            return _filled(_held(adapted, part.view, cases), part.slots)
        own = {slot.name for slot in part.slots}
        given = probes(adapted, [s for s in part.graph.inputs if s.name not in own], example, sizes=part.sizes)
        cases = _filled(given, part.slots)
        if not part.places:
            return cases
        neutral, held = {slot.name: neutral_of(slot) for slot in part.slots}, []
        for call, case in zip(given, cases, strict=True):
            rows = {place.what: case[place.what] for place in part.places}
            inputs = {**neutral, **call, **rows}
            if not part.sizes.allow(part.graph.sizes_of(inputs)):
                continue
            if hold_forward(adapted.base, part.graph, part.places, inputs, nested(call, example)):
                held.append(case)
        if not held:
            what = "no call was found that the model's own code can run with virtual tokens"
            raise PeftfxError(what, type(adapted.base).__name__, "export without them: --no-prefix")
        return held

    def describe(
        self, directory: Path, adapted: AdaptedModel, parts: Sequence[GraphPart], example: Inputs
    ) -> dict[str, str]:
        """Write which slots the graphs have, and which base the model is, as well."""
        why = super().describe(directory, adapted, parts, example)
        base = adapted.base
        kinds = (p.dtype for p in base.parameters() if p.is_floating_point())
        Manifest(
            base=self.source,
            model=type(base).__name__,
            fingerprint=fingerprint(base),
            fingerprint_version=VERSION,
            dtype=str(next(kinds, torch.float32)).removeprefix("torch."),
            views={part.stem: FORWARD if part.seen is None else part.seen.name for part in parts},
            atol=self.atol,
            rtol=self.rtol,
            lost=max((c.max_rel for part in parts for c in part.found), default=0.0) if self.rounds else None,
            image_size=self.image_size,
            slots=tuple(dataclasses.replace(slot, graph=part.stem) for part in parts for slot in part.slots),
        ).write(directory)
        return why


def _held(adapted: AdaptedModel, view: View, cases: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the calls that the model's own code takes, and hold the captured base to it in them.

    A text as long as the model allows leaves no room for virtual tokens. Such a call is left out. Of a large model only
    the largest of the other calls is held.

    Raises:
        PeftfxError: the model's own code takes none of the calls.
        VerificationError: the captured base differs from the eager base.
    """
    largest_first = sorted(cases, key=lambda case: -sum(value.numel() for value in case.values()))
    found: list[dict[str, Tensor]] = []
    refusal: PeftfxError | None = None
    for number, case in enumerate(largest_first):
        try:
            hold_view(adapted, view, case)
        except VerificationError:
            raise
        except PeftfxError as error:
            refusal = error
            continue
        if is_large(adapted.base):
            return largest_first[number:]
        found.append(case)
    if refusal is not None and not found:
        raise refusal
    return found


def forward_part(adapted: AdaptedModel, inputs: Inputs | None, places: Sequence[Place]) -> GraphPart:
    """Capture the forward view, with places for soft prompts. There are none where images are encoded apart."""
    (part,) = capture_with_images(adapted, FORWARD, inputs)
    if part.view is not None:
        return part
    example = adapted.example if inputs is None else inputs
    found = find_forward(adapted.base, example, places, part.graph)
    if found is None:
        return part
    graph, taken = found
    return dataclasses.replace(part, graph=graph, exported=graph, places=taken, slots=tuple(p.slot for p in taken))


def generating_part(
    adapted: AdaptedModel, file: str, name: str, places: Sequence[Place], *, prompts: bool
) -> GraphPart:
    """Capture a view that a model generates in; with places for soft prompts, if there are `prompts`.

    Encoders of images and sounds see no prompts, and the place of one before keys and values of images is not known.
    """
    view = adapted.view(name)
    assert view is not None
    if prompts and isinstance(view, Decode | Encoder | Decoder) and not isinstance(view, DecodeOverImages):
        view = WithPromptInputs.of(view, places)
    graph = adapted.graph(view=view)
    refuse_fixed(graph, view.axes)
    return GraphPart(
        file, view, graph, graph, tuple(p.slot for p in view.places) if isinstance(view, WithPromptInputs) else ()
    )


def _opened(adapted: AdaptedModel, part: GraphPart, target: str) -> GraphPart:
    """Open the slots of a part's layers. Where images are encoded apart, roles are those in the part's own graph."""
    known = adapted.sites if part.view is None or part.view.name != FORWARD else part.graph.sites
    sites = {match.site.path: match.site for match in select(known, target=target, kinds=WEIGHT_KINDS)}
    scaled = tuple(path for path, site in sites.items() if any(plays(site, role) for role in SCALED))
    beside = adapted.sites.headed
    graph = Open(tuple(sites), scaled, beside)(part.graph).graph
    return dataclasses.replace(part, graph=graph, exported=graph, slots=(*part.slots, *slots_of(graph, beside)))


def _filled(cases: Sequence[Mapping[str, Tensor]], slots: Sequence[Slot]) -> list[dict[str, Tensor]]:
    """Make calls with tensors in each slot: neutral tensors in the first call, random values in the others."""
    random = torch.Generator().manual_seed(0)
    made = []
    for rank, case in enumerate(cases):
        given = [slot for slot in slots if slot.what != SLOT_OWN and slot.name not in case]
        own = {slot.name: _value(slot, rank, random) for slot in given}
        made.append({**case, **own})
    return made


def _value(slot: Slot, size: int, random: torch.Generator) -> Tensor:
    shape = tuple(max(size, slot.least) if isinstance(s, str) else s for s in slot.shape)
    value = torch.randn(shape, generator=random) * (0.1 if size else 0.0)
    return (1 + value if slot.what in (INNER, OUTER) else value).to(getattr(torch, slot.dtype))
