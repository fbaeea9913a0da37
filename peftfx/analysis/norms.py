"""Norms: the modules of a graph that normalise values, by torch's operators or by arithmetic, with their parameters.

A norm in plain arithmetic, as most RMS norms are, takes a statistic of its input, and multiplies or shifts the result
by a parameter of the same module: `weight * x`, `x * (1 + weight.float())`. Operations on the parameter before that
make no difference, because methods train a copy that replaces the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from peftfx.analysis.dataflow import ELEMENTWISE, MOVEMENT, NORMED, PRODUCTS, Flow, names, op_name
from peftfx.analysis.weight_ops import module_path
from peftfx.bases.guests import own_parameters
from peftfx.graph.graph import BASE, Graph
from peftfx.sites.site import NORM, Call, NormSite, layer_of

_NORMS = names("layer_norm rms_norm group_norm batch_norm instance_norm")
_STATISTICS = names("mean var var_mean std linalg_vector_norm norm")
_SHIFTS = names("add sub rsub")


@dataclass
class _Found:
    """The weight, bias and calls of a norm found so far."""

    weight: str = ""
    bias: str | None = None
    calls: list[Call] = field(default_factory=list)


def find_norms(graph: Graph, flows: Mapping[fx.Node, Flow]) -> Iterator[NormSite]:
    """Yield the norms of a graph that have a weight or a bias, in the order in which they first run."""
    found: dict[str, _Found] = {}
    parameters: dict[fx.Node, str] = {}  # values of only one parameter, possibly cast, reshaped or shifted
    measured: set[str] = set()  # the modules that have computed a statistic
    for node in graph.nodes():
        if node.op == "get_attr" and _is_parameter(graph, str(node.target)):
            parameters[node] = str(node.target)
        elif node.op == "call_function":
            name, inputs = op_name(node), node.all_input_nodes
            if len(inputs) == 1 and inputs[0] in parameters and name in ELEMENTWISE | MOVEMENT:
                parameters[node] = parameters[inputs[0]]
            elif name in _STATISTICS and flows[inputs[0]].origins:
                measured.add(module_path(node))
            else:
                affine = _affine(node, name, parameters, flows, measured)
                # A node that normalises a table has no other input.
                data = (n for n in inputs if parameters.get(n) not in affine.values())
                _note(graph, found, node, next(data, node), affine)
    return (_site(graph, path, norm) for path, norm in found.items())


def _is_parameter(graph: Graph, target: str) -> bool:
    return target.startswith(f"{BASE}.") and isinstance(graph.get(target), nn.Parameter)


def _affine(
    node: fx.Node, name: str, parameters: Mapping[fx.Node, str], flows: Mapping[fx.Node, Flow], measured: set[str]
) -> dict[str, str]:
    """Return the parameters by which a node scales (`weight`) or shifts (`bias`) a normalised value."""
    if name in _NORMS:
        given = {a.name: v for a, v in zip(_arguments(node), node.args, strict=False)} | node.kwargs
        nodes = {role: given.get(role) for role in ("weight", "bias")}
        return {role: parameters[n] for role, n in nodes.items() if isinstance(n, fx.Node) and n in parameters}
    if name not in PRODUCTS | _SHIFTS or module_path(node) not in measured:
        return {}
    own = [n for n in node.all_input_nodes if n in parameters]
    normed = [n for n in node.all_input_nodes if any(marks & NORMED for marks in flows[n].origins.values())]
    return {"weight" if name in PRODUCTS else "bias": parameters[own[0]]} if own and normed else {}


def _arguments(node: fx.Node) -> list[torch.Argument]:
    assert isinstance(node.target, torch._ops.OpOverload)
    return list(node.target._schema.arguments)


def _note(graph: Graph, found: dict[str, _Found], node: fx.Node, x: fx.Node, affine: Mapping[str, str]) -> None:
    for role, target in affine.items():
        norm = found.setdefault(_path(graph, node, target), _Found())
        norm.weight, norm.bias = (target, norm.bias) if role == "weight" else (norm.weight, target)
        if role == "weight" or not norm.calls:  # a sum after the product is the same call
            norm.calls.append(Call(x.name, node.name, node.name))


def _path(graph: Graph, node: fx.Node, target: str) -> str:
    """Return the path of the module that ran the node, if it alone owns the parameter; else the parameter's path."""
    path, (owner, _, name) = module_path(node), target.removeprefix(f"{BASE}.").rpartition(".")
    module = graph.base.get_submodule(path)
    own = {id(p) for p in module.parameters(recurse=False)}
    if id(graph.get(target)) in own and own == {id(p) for _, p in own_parameters(module)}:
        return path
    return owner if name == "weight" else f"{owner}.{name}".removeprefix(".")


def _site(graph: Graph, path: str, norm: _Found) -> NormSite:
    weight = norm.weight or str(norm.bias)
    shape = tuple(graph.get(weight).shape)
    return NormSite(path, NORM, NORM, layer_of(path), weight, norm.bias, shape, False, (), tuple(norm.calls))
