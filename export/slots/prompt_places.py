"""The places where a model's forward takes soft prompts, and its graph with these places as inputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import sympy
import torch
from torch import Tensor, nn

from peftfx.contract.sequence import prefix, sequence_site, untyped, virtual_tokens
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.export.verification.captured import hold, hold_call, tensors_in
from peftfx.graph.graph import Graph
from peftfx.graph.slots import PREFIX, SLOT_PROMPT
from peftfx.sites.site import SequenceSite
from peftfx.sites.sites import Sites
from peftfx.views.arguments import named_tensors
from peftfx.views.capture import capture
from peftfx.views.capturing.settling import close
from peftfx.views.entry import VirtualTokens, forward
from peftfx.views.forward_axes import axes_of_forward
from peftfx.views.prefix import Prefix
from peftfx.views.prompt_inputs import Place, through
from peftfx.views.view import as_captured

EXAMPLE = 3  #: the number of virtual tokens in an example


def prompt_places_of(base: nn.Module, sites: Sites) -> Iterator[Place]:
    """Yield the places for soft prompts in the forward of a model: none if the model cannot use soft prompts."""
    ways: dict[str, Callable[[int, nn.Module, SequenceSite], VirtualTokens | Prefix]]
    ways = {SLOT_PROMPT: virtual_tokens, PREFIX: prefix}
    for what, way in ways.items():
        with contextlib.suppress(PeftfxError):  # the model embeds no text, or keeps no keys and values
            entry = way(EXAMPLE, base, sequence_site(base, sites))
            yield Place(what, dataclasses.replace(entry, dropped=frozenset()), untyped(base))


def find_forward(
    base: nn.Module, inputs: Mapping[str, object], places: Sequence[Place], plain: Graph
) -> tuple[Graph, tuple[Place, ...]] | None:
    """Capture a forward with those `places` that the model's code takes. Return the graph and them, or None.

    A prefix comes in a cache, and some code computes something else beside a cache, or beside one with tokens: Kosmos-2
    leaves its images out. Then an empty place would not give the base model, and the graph has no such place. Nor has
    it one with which it holds for fewer texts than `plain`, the forward without places. Code that uses the length of
    its text as a number would be fixed to `prompt + sequence = 9`, and LED's attention in windows to one window.
    """
    taken = tuple(place for place in places if place.what not in inputs and _takes(place, inputs))
    for chosen in dict.fromkeys((taken, taken[:1], taken[1:])):
        with contextlib.suppress(PeftfxError):  # the model's code does not run with one of the places
            if chosen:
                hold_to_none = _held_to_none(base, inputs, chosen)
                graph = capture_forward(base, inputs, chosen)
                if not _is_fixed_by(graph, chosen, plain):
                    hold_to_none(graph)
                    return graph, chosen
    return None


def _is_fixed_by(graph: Graph, places: Sequence[Place], plain: Graph) -> bool:
    """Return whether a graph fixes a number that its places are part of, and that is free without them."""
    names, known = {place.what for place in places}, {str(condition.holds) for condition in plain.conditions}
    for condition in graph.conditions:
        holds = condition.holds
        if names.isdisjoint(condition.axes) or not isinstance(holds, sympy.Eq) or not holds.args[1].is_Integer:
            continue
        without = holds.subs({symbol: 0 for symbol in holds.free_symbols if str(symbol) in names})
        if without != sympy.true and str(without) not in known:
            return True
    return False


def _takes(place: Place, inputs: Mapping[str, object]) -> bool:
    try:
        place.entry.check(inputs)
    except PeftfxError:
        return False
    return True


@torch.no_grad()
def _held_to_none(base: nn.Module, inputs: Mapping[str, object], places: Sequence[Place]) -> Callable[[Graph], None]:
    """Hold the model with empty places to the model without them, for a text with a padding token.

    Return a function that holds a graph with these places to the same: the code may ask whether there is a cache, and
    a graph has its answer for one with tokens.

    Raises:
        VerificationError: they differ.
    """
    call, pad = dict(inputs), getattr(getattr(base, "config", None), "pad_token_id", None)
    text = call.get("input_ids")
    if isinstance(text, Tensor) and isinstance(pad, int) and pad >= 0:
        call["input_ids"] = text.index_fill(-1, torch.tensor([text.shape[-1] // 2], device=text.device), pad)
    empty = {**call, **{place.what: place.entry.hole(base)[:0] for place in places}}
    try:
        with as_captured(base):
            want, got = forward(base, call), through(places, forward)(base, empty)
    except Exception as error:  # code that takes no cache without tokens: its graph is held to it later
        raise_if_memory_is_out(error)
        return lambda graph: None
    for a, b in zip(tensors_in(want), tensors_in(got), strict=False):
        hold("", a, b, close(base))
    return torch.no_grad()(lambda graph: hold_call(graph, named_tensors(empty), want))


def capture_forward(base: nn.Module, inputs: Mapping[str, object], places: Sequence[Place]) -> Graph:
    """Capture the graph of a forward with these places as inputs."""
    axes = {**axes_of_forward(base, inputs), **{place.what: (place.what, None) for place in places}}
    holes = {place.what: place.entry.hole(base) for place in places}
    return capture(base, {**inputs, **holes}, axes=axes, call=through(places, forward))


@torch.no_grad()
def hold_forward(
    base: nn.Module, graph: Graph, places: Sequence[Place], case: Mapping[str, Tensor], call: Mapping[str, object]
) -> bool:
    """Compare a graph with the model's own code. Return False if the code takes no call of this size.

    For example, the longest text that a model takes leaves no room for virtual tokens.

    Args:
        base: the model.
        graph: the graph, whose slots other than soft prompts change nothing in this call.
        places: the places for soft prompts in the graph.
        case: all inputs of the graph.
        call: the same inputs as keyword arguments of the model, without the soft prompts.

    Raises:
        VerificationError: the graph and the model's code differ.
    """
    rows = {place.what: case[place.what] for place in places}
    try:
        with as_captured(base):
            want = through(places, forward)(base, {**call, **rows})
    except Exception as error:  # a model's code raises various errors for a size that it does not take
        raise_if_memory_is_out(error)
        return False
    hold_call(graph, case, want)
    return True
