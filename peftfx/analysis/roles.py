"""Roles: the purpose of each weight of a graph, decided by where its output goes and where its input comes from.

No architecture and no module's name is used. Roles are assigned in this order, and the first role stays:

1. attention: the weights that queries, keys and values come from, and the first weight that reads the result;
2. heads: weights whose output is an output of the graph;
3. embeddings, by where their indices come from;
4. MLPs: a linear layer whose input is another linear layer's activated output, and experts in the same way;
5. routers: the linear layers whose output selects the expert of a value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from torch import fx

from peftfx.analysis.attention_heads import read_heads
from peftfx.analysis.attentions import Attention, find_attentions
from peftfx.analysis.dataflow import MATMULS, NORMED, SPLIT, SUMS, op_name, trace_flow
from peftfx.analysis.embeddings_and_heads import embedding_role, is_codebook, reaches_any, reaches_output
from peftfx.analysis.facts import Analysis, WeightFacts
from peftfx.analysis.links import find_links
from peftfx.analysis.mlps_and_routers import assign_mlps, find_output_gates, find_routers
from peftfx.analysis.norms import find_norms
from peftfx.analysis.rows import as_ranges
from peftfx.analysis.running import called_modules, parameter_reads, passed_by, read_past, run_elsewhere
from peftfx.analysis.weight_ops import Occurrence, find_occurrences, module_path
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.sites.site import (
    ATTENTION,
    EXPERTS,
    HEAD,
    ROUTER,
    AttentionSite,
    Call,
    HeadedSite,
    Heads,
    Part,
    WeightSite,
    layer_of,
)
from peftfx.sites.sites import Sites

_Use = tuple[fx.Node, fx.Node, int]
"""The op of a weight, the query, key or value that comes from it, and what happened in between."""

_LATENT = {
    "attention.query": "attention.query_down",
    **dict.fromkeys(("attention.key", "attention.value", "attention.kv"), "attention.kv_down"),
}
_FUSED = {
    frozenset({"query", "key", "value"}): "attention.qkv",
    frozenset({"key", "value"}): "attention.kv",
    frozenset({"query", "key"}): "attention.qk",
    frozenset({"query", "value"}): "attention.qv",
}

_VALUES = {"attention.value", *(role for parts, role in _FUSED.items() if "value" in parts)}


def find_sites(graph: Graph, kept: Collection[str] = ()) -> Sites:
    """Return the sites of a base graph, in the order in which they first run, in time linear in the graph's size.

    Args:
        graph: a base graph.
        kept: the names of outputs that a cache keeps for the next call. A layer whose values are kept is no head.
    """
    analysis = _analyse(graph)
    _assign_attention(analysis)
    _assign_heads(analysis, kept)
    for weight in analysis.weights.values():
        first = weight.occurrences[0]
        if first.kind == "embedding":
            weight.role = embedding_role(graph, first.x)
    assign_mlps(analysis)
    for gate in find_output_gates(analysis):
        gate.role = "mlp.output_gate"
    for router in find_routers(analysis):
        router.role = router.role or ROUTER
    order = {node: i for i, node in enumerate(graph.nodes())}
    weighted = (_site(weight) for weight in analysis.weights.values() if not _is_codebook(graph, weight))
    sites = [*weighted, *_attention_sites(analysis), *find_norms(graph, analysis.flows)]
    nodes = {node.name: order[node] for node in order}
    ordered = tuple(sorted(sites, key=lambda site: nodes[site.calls[0].op]))
    called = called_modules(graph.module)
    elsewhere = run_elsewhere(graph.base, called)
    others = {name for names in elsewhere.values() for name in names}
    ordered = tuple(site for site in ordered if site.path not in others)
    reads, unlike = parameter_reads(graph, ordered), passed_by(graph, ordered)
    links, past = find_links(graph, ordered), read_past(graph, ordered)
    return Sites(ordered, called, frozenset(), reads, elsewhere, unlike, links, read_past=past)


def _analyse(graph: Graph) -> Analysis:
    weights: dict[tuple[str, str], WeightFacts] = {}
    for found in find_occurrences(graph):
        weights.setdefault((found.path, found.kind), WeightFacts([])).occurrences.append(found)
    owner = {found.op: weight for weight in weights.values() for found in weight.occurrences}
    sources = {found.op for weight in weights.values() for found in weight.occurrences if found.mixes_features}
    flows = trace_flow(graph.nodes(), sources)
    layers = {op for op, weight in owner.items() if weight.occurrences[0].kind != "embedding"}
    analysis = Analysis(graph, weights, owner, flows, list(find_attentions(graph, flows, layers)))
    for found in analysis.occurrences():
        if found.op in sources:
            for origin, marks in flows[found.x].origins.items():
                analysis.readers[origin].append((found, marks))
    return analysis


def _assign_attention(analysis: Analysis) -> None:
    uses: dict[int, dict[str, list[_Use]]] = defaultdict(lambda: defaultdict(list))
    projections: dict[int, WeightFacts] = {}
    for attention in analysis.attentions:
        for role, node in attention.inputs():
            for origin, marks in analysis.flows[node].origins.items():
                if _projects(analysis, origin, marks):
                    weight = analysis.owner[origin]
                    projections[id(weight)] = weight
                    uses[id(weight)][role].append((origin, node, marks))
    for key, weight in projections.items():
        reached = _reached(analysis, uses[key])
        weight.role = _FUSED.get(frozenset(reached)) or f"attention.{next(iter(reached))}"
        weight.parts = _attention_parts(analysis, weight, reached)
    _assign_latents(analysis, projections)
    for attended in _attended(analysis):
        readers = (analysis.owner[found.op] for found, _ in analysis.readers[attended])
        output = next((w for w in readers if w.occurrences[0].kind != "embedding"), None)
        if output and not output.role:
            output.role = "attention.output"


def _attended(analysis: Analysis) -> Iterator[fx.Node]:
    """Yield the results of attentions, in order, and what is made of them and of the values alone.

    That is a product of two results, as in approximations by landmarks, and a sum of a result and values that a
    convolution over positions has mixed.
    """
    found = {attention.op for attention in analysis.attentions}
    for node in analysis.graph.nodes():
        if node in found or _combines(analysis, node, found):
            found.add(node)
            yield node


def _combines(analysis: Analysis, node: fx.Node, attended: Collection[fx.Node]) -> bool:
    if analysis.flows[node].origins.keys() != {node} or node in analysis.owner or node.op != "call_function":
        return False
    origins = {o for n in node.all_input_nodes for o in analysis.flows[n].origins}
    rest = [analysis.owner.get(o) for o in origins if o not in attended]
    if op_name(node) in MATMULS:
        return bool(origins) and not rest
    values = all(weight is not None and weight.role in _VALUES for weight in rest)
    return op_name(node) in SUMS and len(rest) < len(origins) and values


def _reached(analysis: Analysis, uses: Mapping[str, list[_Use]]) -> Mapping[str, list[_Use]]:
    """Return the uses of a weight without those that none of its rows reaches.

    Queries, keys and values of three layers may be joined, mixed over positions by one convolution, and split again.
    """
    if len(uses) == 1:
        return uses
    first = {role: (analysis.tracer(places[0][0]), places[0][1]) for role, places in uses.items()}
    missed = {role for role, (tracer, node) in first.items() if tracer.numbers_at(node) and not tracer.rows_at(node)}
    return {role: places for role, places in uses.items() if role not in missed} or uses


def _assign_latents(analysis: Analysis, projections: Mapping[int, WeightFacts]) -> None:
    """Assign roles to layers that compute a latent from which queries, or keys and values, are projected.

    A latent is narrower than the layer's input, and no other attention reads it. The same layer may also compute a
    second part for the keys, which is rotated. The latent of queries may also be read by layers of no role, such as
    those of an indexer, which chooses the tokens that an attention reads.
    """
    for down in reversed(analysis.weights.values()):  # so that the latents of an attention come before its input
        first = down.occurrences[0]
        if first.kind != "linear" or len(down.occurrences) != 1 or not _narrows(first):
            continue
        readers = {id(analysis.owner[reader.op]): analysis.owner[reader.op] for reader, _ in analysis.readers[first.op]}
        roles = {reader.role for key, reader in readers.items() if key in projections}
        beside = [reader.role for key, reader in readers.items() if key not in projections]
        indexed = roles == {"attention.query"} and not any(beside)
        if (not beside or indexed) and len(readers) - len(beside) == 1 and len(roles) == 1 and id(down) not in readers:
            (role,) = roles
            down.role, down.parts = _LATENT.get(role, down.role), () if role in _LATENT else down.parts


def _narrows(found: Occurrence) -> bool:
    out, inner = reversed(found.shape) if found.transposed else found.shape
    return out < inner


def _projects(analysis: Analysis, origin: fx.Node, marks: int) -> bool:
    """Return whether this origin of a query, key or value is its projection.

    A norm in between is allowed, as queries and keys are often normalised. It is not allowed if other weights read the
    normalised value too: then the value is the layer's own input, and the attention uses it without a projection.
    """
    weight = analysis.owner.get(origin)
    if weight is None or weight.occurrences[0].kind == "embedding":
        return False
    return not (marks & NORMED and any(reader & NORMED for _, reader in analysis.readers[origin]))


def _attention_parts(analysis: Analysis, weight: WeightFacts, uses: Mapping[str, list[_Use]]) -> tuple[Part, ...]:
    is_split = any(marks & SPLIT for places in uses.values() for _, _, marks in places)
    if len(uses) == 1 and not is_split:
        return ()
    first = {role: places[0] for role, places in uses.items()}
    tracers = {op: analysis.tracer(op) for op, _, _ in first.values()}
    rows = {role: tracers[op].rows_at(node) for role, (op, node, _) in first.items()}
    everything = len(uses) == 1 and len(next(iter(rows.values()))) == weight.occurrences[0].features[1]
    if everything or not all(rows.values()):
        return ()
    names = (name for name in ("query", "key", "value") if name in rows)
    return tuple(Part(f"attention.{name}", as_ranges(rows[name])) for name in names)


def _assign_heads(analysis: Analysis, kept: Collection[str]) -> None:
    """Assign the role of a head to layers that give an output, and that no other layer reads.

    A model of text and images may give the features of its images, which its text has read, as an output too.
    """
    reached = reaches_output(analysis.graph, analysis.flows, kept)
    read = reaches_any(analysis.graph, {found.op for found in analysis.occurrences()})
    for found in analysis.occurrences():
        weight = analysis.owner[found.op]
        if found.op in reached - read and not weight.role and found.kind != "embedding":
            weight.role = HEAD


def _is_codebook(graph: Graph, weight: WeightFacts) -> bool:
    first = weight.occurrences[0]
    return first.kind == "linear" and is_codebook(graph, first.path, [found.op for found in weight.occurrences])


def _site(weight: WeightFacts) -> WeightSite:
    first = weight.occurrences[0]
    calls = tuple(Call(found.x.name, found.op.name, found.y.name) for found in weight.occurrences)
    role = weight.role or (first.kind if first.kind in ("conv", EXPERTS) else "linear")
    return WeightSite(
        *(first.path, first.kind, role, layer_of(first.path), first.weight, first.bias, first.shape, first.transposed),
        parts=weight.parts,
        calls=calls,
        groups=first.groups,
    )


def _attention_sites(analysis: Analysis) -> Iterator[AttentionSite]:
    groups: dict[str, list[Attention]] = defaultdict(list)
    for found in (attention for attention in analysis.attentions if attention.normalised):
        groups[module_path(found.op)].append(found)
    for path, own in groups.items():
        calls = tuple(Call(a.query.name, a.op.name, a.op.name, a.key.name, a.value.name) for a in own)
        heads, why = _heads(analysis, own)
        place = (path, ATTENTION, ATTENTION, layer_of(path), "", None, (), False, (), calls)
        yield AttentionSite(*place, headless=why) if heads is None else HeadedSite(*place, heads=heads)


def _heads(analysis: Analysis, attentions: list[Attention]) -> tuple[Heads | None, str]:
    """Return the heads of a module's attentions, or the reason why they are not known."""
    try:
        found = {read_heads(analysis, attention) for attention in attentions}
    except PeftfxError as error:
        return None, error.what
    if len(found) > 1:
        return None, "its module computes several attentions of different layers"
    return found.pop(), ""
