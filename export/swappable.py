"""swappable: one graph of a base model in which adapters are put when it runs.

An initializer that is an input too may be left out of a call: then it is what the file holds, of size zero or ones,
which is the base model. ONNX Runtime's `.onnx_adapter` files are named tensors that are given in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from peftfx.adapted import AdaptedModel
from peftfx.decode import Decode
from peftfx.errors import PeftfxError
from peftfx.export.deployment import Deployment, Inputs
from peftfx.export.onnx import every_value
from peftfx.export.parts import FORWARD, Part, capture_parts, generates, refuse_fixed
from peftfx.export.probes import probes
from peftfx.export.quantize import FINITE
from peftfx.export.tidy import PERM
from peftfx.export.weights import SOURCE
from peftfx.graph import BASE
from peftfx.opened import Opened
from peftfx.passes.open import Open, slots_of
from peftfx.sites import NORM, WEIGHT_KINDS, Site, plays
from peftfx.slots import INNER, OUTER, OWN, PREFIX, RANK, TOKENS, Manifest, Slot, fingerprint
from peftfx.soft import encodes_and_decodes
from peftfx.target import select
from peftfx.tasks import PEFT_HEADS, PEFT_TASKS, task_of

SLOTS = "all-linear"  #: the sites that get slots where nobody chose
#: Roles of layers whose input IA3 scales. HF PEFT names modules: for BERT both that end in `output.dense`.
SCALED = ("mlp.down", "attention.output")


@dataclass(frozen=True)
class Slots:
    """Which slots a graph gets.

    Attributes:
        target: the linear layers, convs and embeddings with slots.
        prefix: whether there is one ahead of the past, where the view has a past. For it each step copies the past
            behind what is in it, nothing too.
    """

    target: str = SLOTS
    prefix: bool = True

    @staticmethod
    def of(given: Slots | str) -> Slots:
        """As it is, or for a target alone."""
        return Slots(given) if isinstance(given, str) else given


@dataclass(frozen=True)
class Swappable(Deployment):
    """The graph of a model without adapters, with its slots open.

    Attributes:
        slots: which.
        source: where the base was read from, or empty.
        atol, rtol: of the verification, adapters' too.
    """

    slots: Slots = Slots()
    source: str = ""
    atol: float = 1e-4
    rtol: float = 1e-4

    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[Part]:
        """Capture the base and open its slots.

        Sites that are targeted get a low-rank sum and a scale of their output, and one of their input where their
        role is one of `SCALED`. In the decode view there is a place for a prefix ahead of the text, and beside
        each attention one for keys and values.

        Raises:
            PeftfxError: the model is an encoder-decoder.
        """
        return _opened(adapted, view, inputs, self.slots)

    def finish(self, adapted: AdaptedModel, part: Part, program: ir.Model) -> ir.Model:
        """The program, whose slots may be left out of a call."""
        part.slots = open_initializers(program, part.slots, adapted.base, part.graph.sites)
        return program

    def cases(self, adapted: AdaptedModel, part: Part, example: Inputs) -> list[dict[str, Tensor]]:
        """Calls with something in each slot."""
        if part.view is not None:
            return filled(super().cases(adapted, part, example), part.slots)
        own = {slot.name for slot in part.slots}
        return filled(probes(adapted, [s for s in part.graph.inputs if s.name not in own], example), part.slots)

    def describe(self, directory: Path, adapted: AdaptedModel, parts: Sequence[Part], example: Inputs) -> None:
        """Tell which slots there are, too, and of which base the model is."""
        super().describe(directory, adapted, parts, example)
        for part in parts:
            view = FORWARD if part.seen is None else part.seen.name
            kinds = (p.dtype for p in adapted.base.parameters() if p.is_floating_point())
            dtype = str(next(kinds, torch.float32)).removeprefix("torch.")
            model = type(adapted.base).__name__
            bounds = self.atol, self._rtol(part)
            Manifest(self.source, model, fingerprint(adapted.base), dtype, view, *bounds, part.slots).write(directory)

    def _rtol(self, part: Part) -> float:
        """Of adapters: four times what random ones showed, where nobody bounded what a quantised graph loses."""
        return self.rtol if self.rtol < FINITE else 4 * max(c.max_rel for c in part.found)


def _opened(adapted: AdaptedModel, view: str, inputs: Inputs | None, slots: Slots) -> list[Part]:
    base = adapted.base
    _refuse(adapted)
    if view == FORWARD or not generates(base):
        (part,) = capture_parts(adapted, FORWARD, inputs)
    else:
        found = adapted.view("decode")
        assert isinstance(found, Decode)
        opened = Opened(found) if slots.prefix else found
        graph = adapted.graph(view=opened)
        refuse_fixed(graph, found.axes)
        part = Part("model.onnx", opened, graph, graph)
    graph = part.graph
    sites = {match.site.path: match.site for match in select(adapted.sites, target=slots.target, kinds=WEIGHT_KINDS)}
    scaled = tuple(path for path, site in sites.items() if any(plays(site, role) for role in SCALED))
    beside = tuple(site for site in adapted.sites if site.heads is not None)
    part.graph = part.exported = Open(tuple(sites), scaled, beside)(graph).graph
    ahead = (part.view.slot,) if isinstance(part.view, Opened) else ()
    part.slots = (*ahead, *slots_of(part.graph, beside))
    return [part]


def _refuse(adapted: AdaptedModel) -> None:
    base = adapted.base
    name, hint = type(base).__name__, "export each adapter merged"
    if adapted.active:
        hint = "remove the adapters, and write each to a file of its own (export-adapter)"
        raise PeftfxError("a graph for swappable adapters is of the base alone", ", ".join(adapted.active), hint)
    if generates(base) and encodes_and_decodes(base):
        raise PeftfxError("an encoder-decoder has two graphs, and an adapter file is for one", name, hint)


def open_initializers(
    program: ir.Model, slots: Sequence[Slot], base: nn.Module, sites: Iterable[Site]
) -> tuple[Slot, ...]:
    """Let the slots of a program be left out of a call, and let tensors of the base be replaced; returns all slots.

    These are the biases at sites with slots, norms, and the heads that HF PEFT trains with an adapter.
    """
    values = {str(value.name): value for value in program.graph.inputs}
    for slot in slots:
        value = values[slot.name]
        kind = getattr(torch, slot.dtype)
        tensor = (torch.ones if slot.what in (INNER, OUTER) else torch.zeros)(slot.empty, dtype=kind)
        value.const_value = TorchTensor(tensor, name=slot.name)
        value.meta[SOURCE] = ("ones", slot.empty, slot.dtype)
        # Each site has a rank of its own: one word for all would be a promise, on which memory is planned.
        value.shape = ir.Shape([f"{slot.at}.{s}".strip(".") if isinstance(s, str) else s for s in slot.shape])
        program.graph.initializers[slot.name] = value
    for value in every_value(program.graph):
        if value.shape is not None and not value.is_graph_input():
            value.shape = ir.Shape([None if str(d) in (RANK, TOKENS) else d for d in value.shape])
    return (*slots, *_own(program, slots, base, sites))


def _own(program: ir.Model, slots: Sequence[Slot], base: nn.Module, sites: Iterable[Site]) -> Iterator[Slot]:
    """Tensors of the base, as inputs that may be left out."""
    at = {slot.at for slot in slots if slot.what == OUTER}
    wanted = dict.fromkeys(site.bias for site in sites if site.path in at and site.bias is not None)
    norms = [site.path for site in sites if site.kind == NORM]
    names = [f"{path}.{name}" for path in norms for name, _ in base.get_submodule(path).named_parameters(recurse=False)]
    wanted |= dict.fromkeys(f"{BASE}.{name}" for name in (*names, *head_tensors(base)))
    found = {value.meta.get(SOURCE): value for value in program.graph.initializers.values()}
    for target in wanted:
        value = found.get(target)
        if value is None or value.shape is None or value.dtype is None:  # tied, or read by nothing
            continue
        program.graph.inputs.append(value)
        shape = tuple(int(str(size)) for size in value.shape)
        perm = tuple(int(axis) for axis in value.metadata_props.get(PERM, "").split())
        kind = str(ir.tensor_adapters.to_torch_dtype(value.dtype)).removeprefix("torch.")
        yield Slot(str(value.name), OWN, target.removeprefix(f"{BASE}."), shape, kind, perm)


def head_tensors(base: nn.Module) -> list[str]:
    """The tensors of the heads that HF PEFT trains and saves with any adapter of this task."""
    kinds = {task: kind for kind, task in PEFT_TASKS.items()}
    ends = PEFT_HEADS.get(kinds.get(task_of(base), ""), ())
    paths = [path for path, _ in base.named_modules() if ends and path.endswith(ends)]
    return [f"{path}.{name}" for path in paths for name in base.get_submodule(path).state_dict()]


def filled(cases: Sequence[Mapping[str, Tensor]], slots: Sequence[Slot]) -> list[dict[str, Tensor]]:
    """Calls with something in each slot: in the first what changes nothing, in the others random values."""
    random = torch.Generator().manual_seed(0)
    made = []
    for rank, case in enumerate(cases):
        own = {slot.name: _value(slot, rank, random) for slot in slots if slot.what not in (PREFIX, OWN)}
        made.append({**case, **own})
    return made


def _value(slot: Slot, size: int, random: torch.Generator) -> Tensor:
    shape = tuple(max(size, slot.least) if isinstance(s, str) else s for s in slot.shape)
    value = torch.randn(shape, generator=random) * (0.1 if size else 0.0)
    return (1 + value if slot.what in (INNER, OUTER) else value).to(getattr(torch, slot.dtype))
