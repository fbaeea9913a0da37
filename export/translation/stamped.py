"""The fast road to ONNX: each distinct operation is translated once, and copied to each place where it occurs.

Two nodes are alike if they apply the same operator to values of the same types, sizes and strides. The layers of a
model are made of such nodes. One node of each kind goes into a small program. torch's own exporter translates this
program, with its decompositions, type promotion and onnxscript's library. The ONNX nodes of the result are the
templates. So one layer costs a translation, and each further layer costs only copies.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx
from torch.fx.experimental import _config

from peftfx.export.translation.between_casts import refuse_narrowed, refuse_retyped, scale_queries
from peftfx.export.translation.decompositions import Uncovered, lowered_program
from peftfx.export.translation.preparation import prepare
from peftfx.export.translation.program import Translation, flatten_outputs, run_exporter, symbol_axes, weights_of
from peftfx.export.translation.scopes import put_scope, scoped
from peftfx.graph.contexts import isolated
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.optimization.functional import make_functional
from peftfx.passes.optimization.fuse import OPSET, Fuse, has_norms

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def translate(graph: Graph, opset: int | None, *, fused: bool = False) -> Translation:
    """Translate `graph`, captured in eval mode, without reading a weight.

    Args:
        graph: what to translate.
        opset: the version of the ONNX operators; by default torch's choice, or the first version that has all fused
            operators.
        fused: use ONNX's operators for whole attentions and norms, if the version has them.

    Raises:
        Uncovered: the graph has something that cannot be translated node by node. torch's own road may translate it.
    """
    ready = prepare(graph)
    if fused and (opset or OPSET) >= OPSET:
        found = Fuse()(ready)
        ready, opset = found.graph, opset or (OPSET if found.changed or has_norms(found.graph) else None)
    scale_queries(Rewriter(ready.module.graph))
    refuse_narrowed(graph, ready)
    outputs = flatten_outputs(ready)
    for write in make_functional(Rewriter(ready.module.graph)):
        raise Uncovered(f"a write into a tensor that others see ({write.target})")
    weights = weights_of(ready)
    units = list(_units(ready.module.graph, weights))
    kinds = {unit.key: unit for unit in reversed(units)}
    with isolated(graph.base), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        small = run_exporter(lowered_program(*_program(list(kinds.values()))), opset)
    templates = _templates(small, list(kinds.values()))
    model, targets = _stamp(ready, weights, units, templates, small)
    return Translation(model, targets, symbol_axes(graph.inputs, [n.meta["val"] for n in _inputs(ready)]), outputs)


@dataclass(frozen=True)
class _Unit:
    """An operation at its place in the graph.

    Attributes:
        node: the operator's node.
        sources: the nodes whose values it reads, each once.
        results: the nodes of its results: the operator's own node, or the items taken from it.
        key: equal for operations that share a translation.
    """

    node: fx.Node
    sources: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    key: str


@dataclass(frozen=True)
class _Template:
    """The ONNX nodes of one kind of operation, between its inputs and its outputs."""

    inputs: Sequence[ir.Value]
    nodes: Sequence[ir.Node]
    outputs: Sequence[ir.Value]


def _units(graph: fx.Graph, weights: Mapping[fx.Node, str]) -> Iterator[_Unit]:
    for node in graph.nodes:
        if node.op == "get_attr" and node not in weights:
            raise Uncovered(f"a higher-order operator ({node.target})")
        if node.op != "call_function" or _is_item(node):
            continue
        sources = tuple(dict.fromkeys(n for n in node.all_input_nodes))
        results = (node,)
        if isinstance(node.meta.get("val"), (tuple, list)):
            results = tuple(sorted(node.users, key=lambda user: user.args[1]))
            if not all(map(_is_item, results)):
                raise Uncovered(f"several values passed on as one ({node.target})")
        yield _Unit(node, sources, results, _key(node, sources, results))


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0].meta.get("val"), (tuple, list))  # type: ignore[union-attr]


def _key(node: fx.Node, sources: Sequence[fx.Node], results: Sequence[fx.Node]) -> str:
    """Return all that a translation depends on: the operator, its constants, and its operands' types and sizes."""
    places = {source: f"%{i}" for i, source in enumerate(sources)}
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: _Word(places[n]))
    looks = [_look(source.meta.get("val"), source) for source in sources]
    taken = [user.args[1] for user in results] if results != (node,) else []
    return f"{node.target} {arguments} {looks} {taken} {_look(node.meta.get('val'), node)}"


def _look(value: object, node: fx.Node) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}"
    if isinstance(value, _SYMBOLS):
        return f"{type(value).__name__} {value}"
    if isinstance(value, (tuple, list)):
        return str([_look(item, node) for item in value])
    raise Uncovered(f"a value that is no tensor ({node.target})")


class _Word(str):
    def __repr__(self) -> str:
        return str(self)


def _program(units: Sequence[_Unit]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Make a graph of unconnected operations: every operand is an input, every result an output."""
    rewriter = Rewriter(fx.Graph())
    maps: list[dict[fx.Node, fx.Node]] = []
    inputs: list[fx.Node] = []
    for unit in units:
        maps.append({})
        for source in unit.sources:
            last = inputs[-1] if inputs else None
            inputs.append(rewriter.placeholder(f"operand_{len(inputs)}", source.meta["val"], last))
            maps[-1][source] = inputs[-1]
    outputs = []
    for unit, known in zip(units, maps, strict=True):
        for node in dict.fromkeys((unit.node, *unit.results)):
            known[node] = rewriter.end().copy(node, known)
        outputs += [known[node] for node in unit.results]
    rewriter.graph.output(tuple(outputs))
    return rewriter.graph, inputs, outputs


def _templates(small: ir.Model, units: Sequence[_Unit]) -> dict[str, _Template]:
    inputs, outputs = iter(small.graph.inputs), iter(small.graph.outputs)
    order = {node: i for i, node in enumerate(small.graph)}
    templates = {}
    for unit in units:
        own = [next(inputs) for _ in unit.sources]
        results = [next(outputs) for _ in unit.results]
        nodes = sorted(_between(own, results), key=order.__getitem__)
        for body in (a for node in nodes for a in node.attributes.values() if a.type in _GRAPHS):
            try:
                body.as_graph().clone()
            except (ValueError, TypeError):
                raise Uncovered(f"a body that reads what is around it ({unit.node.target})") from None
        templates[unit.key] = _Template(own, nodes, results)
    return templates


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _between(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> set[ir.Node]:
    """Return the nodes that compute `outputs` from `inputs`, except constants, which all templates share."""
    found: set[ir.Node] = set()
    waiting = list(outputs)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in inputs or node is None or node in found or node.op_type == "Constant":
            continue
        found.add(node)
        waiting += [v for v in node.inputs if v is not None]
    return found


def _inputs(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.nodes() if node.op == "placeholder"]


def _stamp(
    graph: Graph,
    weights: Mapping[fx.Node, str],
    units: Sequence[_Unit],
    templates: Mapping[str, _Template],
    small: ir.Model,
) -> tuple[ir.Model, dict[str, str]]:
    """Build the whole model: inputs, weights, and a copy of its template for each operation."""
    env: dict[fx.Node, ir.Value] = {}
    inputs = []
    for node in _inputs(graph):
        env[node] = _value(node.name, node.meta["val"])
        inputs.append(env[node])
    initializers: dict[str, ir.Value] = {}
    targets: dict[str, str] = {}
    for node, name in weights.items():
        if name not in initializers:
            initializers[name], targets[name] = _value(name, node.meta["val"]), str(node.target)
        env[node] = initializers[name]
    shared: dict[ir.Value, ir.Value] = {}
    nodes: list[ir.Node] = []
    for unit in units:
        template = templates[unit.key]
        values = dict(zip(template.inputs, (env[s] for s in unit.sources), strict=True))
        for original in template.nodes:
            operands = [None if v is None else _operand(v, values, shared) for v in original.inputs]
            copy = _copy(original, operands, scoped(f"{unit.node.name}.{len(values)}", unit.node))
            put_scope(copy, unit.node)
            values |= zip(original.outputs, copy.outputs, strict=True)
            nodes.append(copy)
        for made, value in zip(unit.results, template.outputs, strict=True):
            refuse_retyped(made, value)
            env[made] = _operand(value, values, shared)
    constants = [value.producer() for value in shared.values()]
    lifted = {str(v.name): v for v in shared.values() if v.producer() is None}
    (output,) = (node for node in graph.nodes() if node.op == "output")
    result = ir.Graph(
        inputs,
        [env[v] for v in output.args[0]],  # type: ignore[union-attr, index]
        nodes=[*(node for node in constants if node is not None), *nodes],
        initializers=[*initializers.values(), *lifted.values()],
        opset_imports=dict(small.opset_imports),
        name="main_graph",
    )
    return ir.Model(result, ir_version=small.ir_version, producer_name="peftfx"), targets


def _value(name: str, like: object) -> ir.Value:
    assert isinstance(like, torch.Tensor)
    shape = ir.Shape([size if isinstance(size, int) else str(size.node) for size in like.shape])
    return ir.Value(name=name, type=ir.TensorType(_dtype(like.dtype)), shape=shape)


def _dtype(dtype: torch.dtype) -> ir.DataType:
    try:
        return ir.tensor_adapters.from_torch_dtype(dtype)
    except TypeError:
        raise Uncovered(f"a tensor of {dtype}") from None


def _operand(value: ir.Value, values: Mapping[ir.Value, ir.Value], shared: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return a template value's counterpart in the copy: a value of the copy, or a constant that all copies share."""
    if value in values:
        return values[value]
    if value not in shared:
        node, name = value.producer(), f"constant.{len(shared)}"
        if node is not None:
            shared[value] = _copy(node, [], name).outputs[0]
        else:
            shared[value] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
    return shared[value]


def _copy(node: ir.Node, inputs: Sequence[ir.Value | None], name: str) -> ir.Node:
    count = len(node.outputs)
    attributes = [
        ir.AttrGraph(a.name, a.as_graph().clone()) if a.type is ir.AttributeType.GRAPH else a
        for a in node.attributes.values()
    ]
    new = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=count, version=node.version)
    for i, (old, value) in enumerate(zip(node.outputs, new.outputs, strict=True)):
        value.name, value.type = f"{name}.{i}" if i else name, old.type
        value.shape = None if old.shape is None else old.shape.copy()
    return new
