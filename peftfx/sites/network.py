"""The network of a model's sites: which site reads the output of which other, and the operators between them.

The network's other nodes are *junctions*: inputs, outputs, and joins, where values of different sites are added, as in
a residual connection. Joins keep the network linear in the model's size: without them each site would have links from
all sites before it.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import networkx as nx

from peftfx.files import writing
from peftfx.sites.dataflow import INPUT, OUTPUT, Dataflow, keys_of
from peftfx.sites.site import Site, layer_of

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


def make_network(sites: Sequence[Site], flow: Dataflow) -> nx.DiGraph:
    """Return the network of the sites, which cannot be changed.

    Nodes of sites are named by `keys_of`, junctions as `join:add_3` or `input:input_ids`. Nodes have the attributes
    `path`, `kind`, `role`, `layer` and `shape`; edges have `ops`.
    """
    network = nx.DiGraph()
    names = [*keys_of(sites), *(f"{j.kind}:{j.name}" for j in flow.junctions)]
    for name, site in zip(names, sites, strict=False):
        network.add_node(
            name, path=site.path, kind=site.kind, role=site.role, layer=site.layer, shape=tuple(site.shape)
        )
    for name, junction in zip(names[len(sites) :], flow.junctions, strict=True):
        layer = layer_of(junction.path)
        network.add_node(name, path=junction.path, kind=junction.kind, role=junction.kind, layer=layer, shape=())
    network.add_edges_from((names[link.source], names[link.target], {"ops": link.ops}) for link in flow.links)
    return nx.freeze(network)


def reached(neighbours: Mapping[str, Iterable[str]], start: Iterable[str]) -> frozenset[str]:
    """Return the nodes that are reached from the `start` nodes by one step or more. Each node is visited once."""
    found: set[str] = set()
    waiting = deque(start)
    while waiting:
        for other in neighbours[waiting.popleft()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return frozenset(found)


@lru_cache(1 << 16)
def layer_path(path: str) -> str:
    """Return the path of the layer that a module is in, up to the first number: `model.layers.3`; or ""."""
    found = _LAYER.match(path)
    return found[0] if found else ""


def inner_layer(path: str, cut: Collection[str]) -> str:
    """Return the path of the layer that a module is in.

    In a layer that is cut, that is the path of the layer inside it, if the module is in one.
    """
    layer = layer_path(path)
    while layer in cut:
        inner = layer_path(path.removeprefix(f"{layer}."))
        if not inner:
            break
        layer = f"{layer}.{inner}"
    return layer


def cut_layers(network: nx.DiGraph) -> frozenset[str]:
    """Return the layers to cut: those that equal no other layer and contain equal layers, such as blocks of a U-Net."""
    cut: set[str] = set()
    waiting = [layer for layer, *others in equal_layers(network) if not others]
    while waiting:
        layer = waiting.pop()
        within = network.subgraph([n for n, path in network.nodes(data="path") if inner_layer(path, cut) == layer])
        groups = [g for g in equal_layers(within, {*cut, layer}) if g != (layer,)]
        sizes = Counter(inner_layer(path, {*cut, layer}) for path in dict(within.nodes(data="path")).values())
        if any(len(group) > 1 and sizes[group[0]] > 1 for group in groups):
            cut.add(layer)
            waiting += [inner for inner, *others in groups if not others]
    return frozenset(cut)


def equal_layers(network: nx.DiGraph, cut: Collection[str] = ()) -> list[tuple[str, ...]]:
    """Return the paths of the layers, in groups that have the same sites of the same shapes with the same links.

    Args:
        network: the network of the sites.
        cut: layers that are replaced by the layers inside them.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for name, path in network.nodes(data="path"):
        if layer := inner_layer(path, cut):
            members[layer].append(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for layer, names in members.items():
        inner = nx.DiGraph()
        inner.add_nodes_from((name, {"label": _label(network.nodes[name])}) for name in names)
        own = set(names)
        for name in names:
            links = ((other, link) for other, link in network.adj[name].items() if other in own)
            inner.add_edges_from((name, other, {"ops": " ".join(link["ops"])}) for other, link in links)
        groups[_hash(inner)].append(layer)
    return [tuple(layers) for layers in groups.values()]


def _label(node: Mapping[str, object]) -> str:
    return f"{node['kind']} {node['role']} {node['shape']}"


def _hash(layer: nx.DiGraph) -> str:
    with warnings.catch_warnings():  # networkx warns that hashes differ from those of 3.4; no hash is kept here
        warnings.simplefilter("ignore", UserWarning)
        return nx.weisfeiler_lehman_graph_hash(layer, node_attr="label", edge_attr="ops")


def layer_ends(network: nx.DiGraph) -> dict[str, str]:
    """Return the last node of each layer that all data pass on the way from a start of the model to an output.

    A start is a site that reads an input of the model and no other site, such as an embedding of tokens or a conv of
    patches. A layer without such a node, because two values leave it, is left out.
    """
    plain = nx.DiGraph()
    plain.add_nodes_from(n for n, kind in network.nodes(data="kind") if kind != INPUT)
    plain.add_edges_from((a, b) for a, b in network.edges if a in plain)
    outputs = [name for name, kind in network.nodes(data="kind") if kind == OUTPUT]
    ends: dict[str, str] = {}
    for start in (name for name in plain if not plain.pred[name] and network.pred[name]):
        above = nx.immediate_dominators(plain, start)
        spines = [_spine(above, output, start) for output in outputs if output in above]
        shared = set.intersection(*map(set, spines)) if spines else set()
        for name in (node for node in reversed(spines[0]) if node in shared) if spines else ():
            layer = layer_path(network.nodes[name]["path"])
            if layer:
                ends[layer] = name
    return ends


def _spine(above: Mapping[str, str | None], node: str, start: str) -> list[str]:
    """Return the nodes that every way from `start` to `node` passes, from `node` backwards."""
    spine = [node]
    while node != start and (parent := above[node]) is not None:
        spine.append(parent)
        node = parent
    return spine


def to_json(network: nx.DiGraph) -> dict[str, Any]:
    """Return the network as JSON-ready values, in networkx's node-link form."""
    return nx.node_link_data(network, edges="edges")


def to_graphml(network: nx.DiGraph) -> str:
    """Return the network as GraphML with plain attributes: a shape as `64x32`, operators as words."""
    plain = nx.DiGraph()
    for name, data in network.nodes(data=True):
        shape = {"shape": "x".join(map(str, data["shape"]))}
        plain.add_node(name, **{key: value for key, value in {**data, **shape}.items() if value is not None})
    plain.add_edges_from((a, b, {"ops": " ".join(data["ops"])}) for a, b, data in network.edges(data=True))
    return "\n".join(nx.generate_graphml(plain)) + "\n"


def write_graphml(network: nx.DiGraph, file: Path) -> None:
    """Write the network to a file. An existing file is replaced.

    Raises:
        PeftfxError: the file cannot be written.
    """
    with writing(file):
        file.write_text(to_graphml(network), encoding="utf-8")


def picked_by(relation: str, network: nx.DiGraph, *given: Iterable[str]) -> frozenset[str]:
    """Return the nodes before (`upstream`), after (`downstream`) or between the given nodes (`between`)."""
    if relation == "upstream":
        return reached(network.pred, given[0])
    if relation == "downstream":
        return reached(network.succ, given[0])
    return reached(network.succ, given[0]) & reached(network.pred, given[1])
