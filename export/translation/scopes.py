"""Record the base's module that each ONNX node comes from: in its name, its values' names and its metadata.

Netron shows these names. Explorers that group nodes by the paths in their names show a model layer by layer.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable

import onnx_ir as ir
from torch import fx

from peftfx.analysis.weight_ops import base_path, module_path
from peftfx.export.metadata import SCOPE

_TOLD = "pkg.torch.onnx.name_scopes"  #: the metadata key under which torch's exporter lists the modules of a node
_BETWEEN = "/"  #: between a module's path and a node's name in the module


def scoped(name: str, node: fx.Node) -> str:
    """Prefix a name with the path of the module that a node belongs to."""
    return f"{path}{_BETWEEN}{name}" if (path := module_path(node)) else name


def put_scope(made: ir.Node, node: fx.Node) -> None:
    """Record the module of an ONNX node, and name the node after it. `name_apart` makes equal names differ."""
    if path := module_path(node):
        _name(made, path)


def hand_scope(old: ir.Node, made: Iterable[ir.Node]) -> None:
    """Record the module of a node for the nodes that replace it."""
    if path := old.metadata_props.get(SCOPE):
        for node in made:
            _name(node, path)


def _name(node: ir.Node, path: str) -> None:
    """Record the module of a node, and name the node after it."""
    node.metadata_props[SCOPE] = path
    node.name = f"{path}{_BETWEEN}{node.op_type}"


def adopt_scopes(model: ir.Model) -> None:
    """Record the module of each node that torch's exporter knows it of, and name the node and its values after it."""
    for node in model.graph:
        told = node.metadata_props.get(_TOLD)
        if told is None or not (path := base_path(_innermost(told))):
            continue
        _name(node, path)
        for value in node.outputs:
            value.name = f"{path}{_BETWEEN}{value.name}"


def _innermost(told: str) -> str:
    """Return the innermost module of a written list of modules, whose last item is the name of an fx node."""
    *paths, _ = ast.literal_eval(told)
    return str(paths[-1]) if paths else ""


def put_rest(program: ir.Model) -> None:
    """Record the module of nodes that replaced others, such as products of codes: their neighbours tell it."""
    nodes = list(program.graph)
    taken = {node.name for node in nodes}
    for node in reversed(nodes):
        if SCOPE not in node.metadata_props and node.op_type != "Constant":
            _take(node, (user for value in node.outputs for user in value.consumers()), taken)
    for node in nodes:
        if SCOPE not in node.metadata_props and node.op_type != "Constant":
            makers = (None if value is None else value.producer() for value in node.inputs)
            _take(node, (maker for maker in makers if maker is not None), taken)


def _take(node: ir.Node, others: Iterable[ir.Node], taken: set[str | None]) -> None:
    """Copy the module of the neighbours in `others` to a node if all of them have the same module."""
    scopes = {other.metadata_props[SCOPE] for other in others if SCOPE in other.metadata_props}
    if len(scopes) != 1:
        return
    (path,) = scopes
    name = f"{path}{_BETWEEN}{node.op_type}"
    free = name if name not in taken else next(n for i in itertools.count(1) if (n := f"{name}_{i}") not in taken)
    taken.add(free)
    node.metadata_props[SCOPE], node.name = path, free
