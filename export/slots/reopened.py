"""A graph with slots, captured again: torch computes what the exported graph computes, without its rounding.

The base of a quantised graph loses more than a wrong adapter may change. So the tensors of an adapter are put into the
slots of this graph, where they have to give what the model's own code gives under the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from peftfx.contract.placement import owner_of
from peftfx.errors import PeftfxError
from peftfx.export.slots.initializers import neutral_of
from peftfx.export.slots.prompt_places import prompt_places_of
from peftfx.export.slots.swappable import forward_part, generating_part
from peftfx.export.verification.comparison import reference_of
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.graph.graph import Graph
from peftfx.graph.slots import INNER, KEYS, OUTER, PREFIX, SLOT_OWN, SLOT_PROMPT, Manifest, Slot
from peftfx.model.adapted import AdaptedModel
from peftfx.options import FORWARD
from peftfx.passes.slots.open import Open


@dataclass(frozen=True)
class Reopened:
    """A graph of the base with open slots, and tensors in them: a reference for calls without slots.

    Attributes:
        graph: the graph.
        slots: its slots.
        put: the tensors in slots, by the slots' names.
    """

    graph: Graph
    slots: tuple[Slot, ...]
    put: Mapping[str, Tensor]

    def holding(self, put: Mapping[str, Tensor]) -> Reopened:
        """Return the graph with other tensors in these slots, in any dtype that the graph then computes in."""
        specs = (replace(s, dtype=put[s.name].dtype) if s.name in put else s for s in self.graph.inputs)
        return replace(self, graph=replace(self.graph, inputs=tuple(specs)), put={**self.put, **put})

    def of(self, graph: Graph) -> Reopened:
        """Return another form of the graph with the same tensors in its slots."""
        return replace(self, graph=graph)

    def __call__(self, feed: Tensors) -> Tensors:
        """Return the outputs of a call, by name."""
        own = {slot: self.put[slot.name] for slot in self.slots if slot.what == SLOT_OWN and slot.name in self.put}
        with _holding(self.graph.base, own):
            return reference_of(self.graph)({**feed, **self.put})


def reopened(
    adapted: AdaptedModel,
    manifest: Manifest,
    name: str,
    put: Mapping[str, Tensor],
    example: Mapping[str, object] | None = None,
) -> Reopened | None:
    """Capture the graph of a file with slots again; None if its slots are not those of the file.

    Args:
        adapted: the base of the graph, with any adapters.
        manifest: the slots of the exported graphs.
        name: the stem of the graph's file.
        put: the tensors for its slots, by name.
        example: the arguments of a forward call, if they are not the model's own example.
    """
    slots = manifest.of(name)
    at = {what: tuple(s.at for s in slots.values() if s.what == what) for what in (OUTER, INNER, KEYS)}
    prompts = any(slot.what in (SLOT_PROMPT, PREFIX) for slot in slots.values())
    with adapted.named.acting_as(()), contextlib.suppress(PeftfxError):
        places = tuple(prompt_places_of(adapted.base, adapted.sites)) if prompts else ()
        kind = manifest.views[name]
        if kind == FORWARD:
            part = forward_part(adapted, example, places)
        else:
            part = generating_part(adapted, name, kind, places, prompts=prompts)
        beside = tuple(site for site in adapted.sites.headed if site.path in at[KEYS])
        graph = Open(at[OUTER], at[INNER], beside)(part.graph).graph
        asked = {spec.name for spec in graph.inputs} - {spec.name for spec in part.graph.inputs}
        asked |= {slot.name for slot in part.slots}
        if asked == {slot.name for slot in slots.values() if slot.what != SLOT_OWN}:
            empty = {slot.name: neutral_of(slot) for slot in slots.values() if slot.what != SLOT_OWN}
            return Reopened(graph, tuple(slots.values()), {**empty, **put})
    return None


@contextlib.contextmanager
def _holding(base: nn.Module, own: Mapping[Slot, Tensor]) -> Iterator[None]:
    """Let a base have these tensors in place of its own until the `with` block ends."""
    with contextlib.ExitStack() as stack:
        for slot, laid in own.items():
            module, leaf = owner_of(base, slot.at)
            held = module._parameters if leaf in module._parameters else module._buffers
            back = sorted(range(laid.ndim), key=slot.perm.__getitem__) if slot.perm else range(laid.ndim)
            stack.callback(held.__setitem__, leaf, held[leaf])  # type: ignore[arg-type]
            held[leaf] = laid.permute(*back)  # type: ignore[assignment]
        yield
