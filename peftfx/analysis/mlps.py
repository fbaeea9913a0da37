"""MLPs: a linear layer whose input is another linear layer's activated output, and experts in the same way."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from peftfx.analysis.dataflow import ACTIVATED, GATED, MIXED
from peftfx.analysis.facts import Analysis, WeightFacts
from peftfx.analysis.rows import as_ranges
from peftfx.analysis.weight_ops import Occurrence
from peftfx.sites.site import EXPERTS, Part


def assign_mlps(analysis: Analysis) -> None:
    """Assign the roles of MLPs, gated or not, to layers that have none yet."""
    for found in analysis.occurrences():
        weight = analysis.owner[found.op]
        if not _is_product(found) or weight.role:
            continue
        origins = {o: marks for o, marks in analysis.flows[found.x].origins.items() if o.op != "placeholder"}
        if all(_feeds_only(analysis, origin, weight) for origin in origins):
            _assign_mlp(analysis, found, origins)


def _is_product(found: Occurrence) -> bool:
    """Return whether a weight multiplies the features of each token. A convolution of size 1 over tokens does too."""
    return found.kind in ("linear", EXPERTS) or (found.kind == "conv" and len(found.shape) == 3 and found.shape[2] == 1)


def _feeds_only(analysis: Analysis, origin: fx.Node, down: WeightFacts) -> bool:
    """Return whether `origin` is a layer of no role yet, of `down`'s kind, that only `down` reads."""
    up = analysis.owner.get(origin)
    if up is None or up is down or up.role or not _is_product(up.occurrences[0]):
        return False
    if up.occurrences[0].kind != down.occurrences[0].kind:
        return False
    return all(analysis.owner[reader.op] is down for reader, _ in analysis.readers[origin])


def _assign_mlp(analysis: Analysis, down: Occurrence, origins: Mapping[fx.Node, int]) -> None:
    ordered = sorted(origins.items(), key=lambda item: not item[1] & ACTIVATED)
    active = [bool(marks & ACTIVATED) for _, marks in ordered]
    ups = [analysis.owner[origin] for origin, _ in ordered]
    if down.kind == "conv" and any(marks & MIXED for _, marks in ordered):
        return  # a convolution over tokens between two products of features
    if active == [True]:
        _assign_up(analysis, ups[0], *ordered[0], down)
    elif active == [True, False] and all(marks & GATED for _, marks in ordered):
        ups[0].role, ups[1].role = _of_mlp(down, "gate"), _of_mlp(down, "up")
    else:
        return
    analysis.owner[down.op].role = _of_mlp(down, "down")


def _assign_up(analysis: Analysis, up: WeightFacts, op: fx.Node, marks: int, down: Occurrence) -> None:
    up.role = _of_mlp(down, "up")
    # Both halves of a fused gate and up projection have one origin. `glu` splits and multiplies in one op.
    halves = analysis.tracer(op).gate_and_up(down.x) if marks else None
    if halves:
        up.role = _of_mlp(down, "gate_up")
        up.parts = tuple(
            Part(_of_mlp(down, name), as_ranges(rows)) for name, rows in zip(("gate", "up"), halves, strict=True)
        )


def _of_mlp(down: Occurrence, name: str) -> str:
    return f"{EXPERTS if down.kind == EXPERTS else 'mlp'}.{name}"
