"""MLPs, experts and routers.

An MLP is a linear layer whose input is another linear layer's activated output, and experts are found in the same way.
A router selects the expert of each row of values. If rows are sorted by their experts, one grouped product multiplies
them, and the ends of each expert's rows are computed from the indices that the router's scores give. If every expert
reads every value, a router is a layer whose largest output features are picked, for each value by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from peftfx.analysis.dataflow import (
    ACTIVATED,
    ACTIVATIONS,
    ELEMENTWISE,
    GATED,
    MIXED,
    PRODUCTS,
    SOFTMAX,
    data_of,
    op_name,
)
from peftfx.analysis.facts import Analysis, WeightFacts
from peftfx.analysis.rows import as_ranges
from peftfx.analysis.stored_weights import is_grouped
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


def find_routers(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield the linear layers whose output selects the expert of a value. A layer may come several times."""
    yield from _choosing(analysis)
    yield from _sorting(analysis)


def find_output_gates(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield the linear layers of one feature whose activated output multiplies an MLP's whole output."""
    for weight in analysis.weights.values():
        first = weight.occurrences[0]
        if first.kind == "linear" and not weight.role and 1 in first.shape and _scales_an_mlp(analysis, first.op):
            yield weight


def _scales_an_mlp(analysis: Analysis, node: fx.Node) -> bool:
    while len(node.users) == 1:
        (user,) = node.users
        others = [n for n in data_of(user, analysis.flows) if n is not node]
        if not others and (op_name(user) in ELEMENTWISE or op_name(user) in ACTIVATIONS):
            node = user
            continue
        origins = [o for n in others for o in analysis.flows[n].origins]
        roles = {analysis.owner[o].role if o in analysis.owner else "" for o in origins}
        return op_name(user) in PRODUCTS and roles == {"mlp.down"}
    return False


def _choosing(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield linear layers whose output reaches a `topk` over features through scales, shifts and softmax only."""
    for node in analysis.graph.nodes():
        if op_name(node) != "topk" or not isinstance(node.args[0], fx.Node):
            continue
        scores, axis = node.args[0], node.args[2] if len(node.args) > 2 else -1
        if axis not in (-1, scores.meta["val"].ndim - 1):
            continue
        while scores not in analysis.owner and (op_name(scores) in SOFTMAX or op_name(scores) in ELEMENTWISE):
            data = data_of(scores, analysis.flows)
            if len(data) != 1:
                break
            (scores,) = data
        weight = analysis.owner.get(scores)
        if weight is not None and weight.occurrences[0].kind == "linear":
            yield weight


def _sorting(analysis: Analysis) -> Iterator[WeightFacts]:
    """Yield the linear layers that the ends of a grouped product's groups are computed from."""
    ends = [found.op.args[2] for found in analysis.occurrences() if found.kind == EXPERTS and is_grouped(found.op)]
    todo = [node for node in ends if isinstance(node, fx.Node)]
    seen = set(todo)
    while todo:
        node = todo.pop()
        weight = analysis.owner.get(node)
        if weight is not None:
            yield weight
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        todo += new
        seen.update(new)
