"""batched: one graph in which each row of a batch has an adapter of its own, by a number that it comes with.

The adapters are constants of the graph: what they do at a layer is stacked, ranks padded by zeros to the largest, and
each row takes its own. Prefixes are padded ahead to the longest, and masked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftfx.adapted import AdaptedModel
from peftfx.decode import Decode
from peftfx.errors import PeftfxError
from peftfx.export.adapters import WORDS, wanted_of
from peftfx.export.deployment import Deployment, Inputs
from peftfx.export.parts import DECODE, FORWARD, Part, capture_parts, generates, refuse_fixed
from peftfx.export.probes import probes, view_probes
from peftfx.export.verify import Reference, reference_of
from peftfx.graph import BASE
from peftfx.passes.by_row import ByRow
from peftfx.placement import site_tensors
from peftfx.rowwise import BATCHED, IDS, Rowwise
from peftfx.sites import WEIGHT_KINDS, Site
from peftfx.slots import INNER, OUTER, OWN, PREFIX, PROMPT, A, B
from peftfx.soft import encodes_and_decodes
from peftfx.stored import exact
from peftfx.update import Update

Wanted = Mapping[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Batched(Deployment):
    """The graph of a model in which rows choose among these of its adapters."""

    adapters: tuple[str, ...] = ()

    def names(self, adapted: AdaptedModel) -> Sequence[str]:
        return self.adapters

    def capture(self, adapted: AdaptedModel, view: str, inputs: Inputs | None) -> list[Part]:
        """Capture the base, and let rows choose.

        Raises:
            PeftfxError: the model is an encoder-decoder, or an adapter does something that rows cannot have apart.
        """
        base = adapted.base
        decodes = view != FORWARD and generates(base)
        if decodes and encodes_and_decodes(base):
            what = "rows of an encoder-decoder have no adapters of their own yet"
            raise PeftfxError(what, type(base).__name__, "export each adapter merged")
        each = [_told(adapted, name, decodes=decodes) for name in self.adapters]
        if not decodes and any(("", what) in own for own in each for what in (PROMPT, PREFIX)):
            what = "a soft prompt has a place for each row in the decode view alone"
            raise PeftfxError(what, type(base).__name__, "export that view, or the adapter merged")
        stacks = _stacked(adapted, each)
        with adapted.disable_adapter():
            if not decodes:
                (part,) = capture_parts(adapted, FORWARD, inputs)
            else:
                found = adapted.view(DECODE)
                assert isinstance(found, Decode)
                lengths = (0, *(len(own.get(("", PREFIX), ())) for own in each))
                rowwise = Rowwise(found, lengths)
                graph = adapted.graphs.captured(rowwise.inputs(base), rowwise.entry, rowwise)
                refuse_fixed(graph, found.axes)
                part = Part("model.onnx", found, graph, graph)
        part.graph = part.exported = ByRow(stacks)(part.graph).graph
        return [part]

    def cases(self, adapted: AdaptedModel, part: Part, example: Inputs) -> list[dict[str, Tensor]]:
        """Calls in which the rows have adapters, and none, in turn."""
        with adapted.disable_adapter():
            if part.view is not None:
                return with_ids(view_probes(adapted, part.view), len(self.adapters))
            specs = [s for s in part.graph.inputs if s.name != IDS]
            return with_ids(probes(adapted, specs, example), len(self.adapters))

    def reference(self, adapted: AdaptedModel, part: Part) -> Reference:
        """Each row is what the model with that row's adapter alone makes of it."""
        return each_alone(adapted, part, self.adapters)

    def describe(self, directory: Path, adapted: AdaptedModel, parts: Sequence[Part], example: Inputs) -> None:
        """Tell which number is which adapter's; other runtimes do not know of `adapter_ids`."""
        told = json.dumps({"adapters": list(self.adapters)}, indent=1)
        (directory / BATCHED).write_text(f"{told}\n", encoding="utf-8")


def _told(adapted: AdaptedModel, name: str, *, decodes: bool) -> dict[tuple[str, str], Tensor]:
    """What one adapter does at layers, as updates alone, and its prefix."""
    adapted.set_adapter(name)
    told = wanted_of(adapted, decodes=decodes)
    layers = [site for site in adapted.sites if site.kind in WEIGHT_KINDS]
    sites = {site.weight.removeprefix(f"{BASE}."): site for site in layers if site.kind == "linear"}
    biases = {site.bias.removeprefix(f"{BASE}."): site for site in layers if site.bias}
    made: dict[tuple[str, str], Tensor] = {}
    for (at, what), value in told.items():
        if what != OWN:
            made[at, what] = value
        elif at in biases:
            made[biases[at].path, OWN] = value
        elif at.endswith(".bias") and at.removesuffix(".bias") in {site.path for site in layers}:
            made[at.removesuffix(".bias"), OWN] = value
        elif at in sites:
            made |= _replaced(adapted, sites[at], value)
        else:
            what, hint = f"a trained copy of {at} cannot be a row's own", "export the adapter merged"
            raise PeftfxError(what, name, hint)
    other = next(((at, what) for at, what in made if what not in (INNER, OUTER, A, B, OWN, PROMPT, PREFIX)), None)
    if other is not None:
        raise PeftfxError(f"rows cannot have {WORDS[other[1]]} {other[0]} of their own", name, "export it swappable")
    return made


def _replaced(adapted: AdaptedModel, site: Site, weight: Tensor) -> dict[tuple[str, str], Tensor]:
    """Another weight in the place of a site's, a head's say: a scale of 0, and a sum that is the weight."""
    own = weight.T if site.transposed else weight
    rows, columns = site_tensors(adapted.base, site)[0].T.shape if site.transposed else site.shape
    if own.shape != (rows, columns):
        what = f"the adapter's weight is {list(own.shape)}, and the base's {[rows, columns]}"
        raise PeftfxError(what, site.path, "adapters of one graph have heads of one size")
    square = torch.eye(min(rows, columns), dtype=own.dtype)
    update = Update(a=own, b=square) if rows <= columns else Update(a=square, b=own)
    assert update.a is not None
    assert update.b is not None
    return {
        (site.path, OUTER): own.new_zeros(rows),
        (site.path, A): update.a.T.contiguous(),
        (site.path, B): update.b.T.contiguous(),
    }


def _stacked(adapted: AdaptedModel, each: Sequence[Wanted]) -> dict[tuple[str, str], Tensor]:
    """An entry for each adapter, behind one that changes nothing; ranks and prefixes are padded."""
    stacks: dict[tuple[str, str], Tensor] = {}
    for place in dict.fromkeys(place for own in each for place in own):
        at, what = place
        given = [own[place] for own in each if place in own]
        shape = [max(sizes) for sizes in zip(*(value.shape for value in given), strict=True)]
        kind = _dtype(adapted, at)
        neutral = _neutral(adapted, at, what, shape).to(kind)
        rows = [neutral, *(_padded(own[place], shape, what).to(kind) if place in own else neutral for own in each)]
        stacks[place] = torch.stack(rows).detach().cpu()
    return stacks


def _dtype(adapted: AdaptedModel, at: str) -> torch.dtype:
    if at:
        return site_tensors(adapted.base, adapted.sites.by_path(at))[0].dtype
    view = adapted.view(DECODE)
    assert isinstance(view, Decode)
    return view.layers[0].dtype


def _neutral(adapted: AdaptedModel, at: str, what: str, shape: Sequence[int]) -> Tensor:
    """What changes nothing."""
    if what in (INNER, OUTER):
        return torch.ones(shape)
    if what == OWN:
        bias = site_tensors(adapted.base, adapted.sites.by_path(at))[1]
        return torch.zeros(shape) if bias is None else exact(bias).detach()
    return torch.zeros(shape)


def _padded(value: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """A tensor with zeros behind it; ahead of it where it is a prefix."""
    padded = value.new_zeros(*shape)
    if what == PREFIX:
        padded[len(padded) - len(value) :] = value
    else:
        padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def each_alone(adapted: AdaptedModel, part: Part, names: Sequence[str]) -> Reference:
    """The reference: each row is what the model with that row's adapter alone makes of it."""

    def run(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, rest = feed[IDS], {name: value for name, value in feed.items() if name != IDS}
        found: dict[str, Tensor] = {}
        for number in sorted(set(ids.tolist())):
            adapted.set_adapter(names[number] if number >= 0 else ())
            graph = adapted.graph(view=part.view) if part.view is not None else adapted.graph(rest)
            for name, value in reference_of(graph)(rest).items():
                own = found.setdefault(name, torch.zeros_like(value))
                own[ids == number] = value[ids == number]
        return found

    return run


def with_ids(cases: Sequence[Mapping[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Calls in which the rows have adapters, and none, in turn."""
    made = []
    for first, case in enumerate(cases):
        rows = next(iter(case.values())).shape[0]
        made.append({**case, IDS: (torch.arange(first, first + rows) % (count + 1)) - 1})
    return made
