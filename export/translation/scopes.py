"""Record the base's module that each ONNX node comes from: in its name, its values' names and its metadata.

Netron shows these names. Explorers that group nodes by the paths in their names show a model layer by layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import onnx_ir as ir
from torch import fx

from peftfx.analysis.weight_ops import module_path
from peftfx.export.metadata import SCOPE

_BETWEEN = "/"  #: between a module's path and a node's name in the module


def scoped(name: str, node: fx.Node) -> str:
    """Prefix a name with the path of the module that a node belongs to."""
    return f"{path}{_BETWEEN}{name}" if (path := module_path(node)) else name


def put_scope(made: ir.Node, node: fx.Node) -> None:
    """Record the module of an ONNX node, and name the node after it. `name_apart` makes equal names differ."""
    if path := module_path(node):
        made.metadata_props[SCOPE] = path
        made.name = f"{path}{_BETWEEN}{made.op_type}"


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
