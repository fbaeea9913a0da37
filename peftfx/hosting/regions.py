"""Regions of a graph: the nodes that one call of a module runs, with the tensors that enter and leave."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from peftfx.graph.graph import BASE, Graph


@dataclass(frozen=True)
class _Region:
    """The nodes that one call of a module runs.

    Attributes:
        nodes: the nodes that the call runs, including those of modules inside the module.
        inputs: the tensors that these nodes read and other nodes compute, without weights and constants.
        outputs: the tensors that these nodes compute and other nodes read.
    """

    nodes: frozenset[fx.Node]

    @property
    def inputs(self) -> set[fx.Node]:
        read = {n for node in self.nodes for n in node.all_input_nodes} - self.nodes
        return {n for n in read if n.op != "get_attr" and _is_tensor(n)}

    @property
    def outputs(self) -> set[fx.Node]:
        return {node for node in self.nodes if _is_tensor(node) and any(user not in self.nodes for user in node.users)}


class Regions:
    """The regions of a graph, by the paths of their modules and by their nodes."""

    def __init__(self, graph: Graph) -> None:
        found: dict[str, dict[str, list[fx.Node]]] = {}
        for node in graph.nodes():
            if node.op == "call_function":
                for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                    if path.partition(".")[0] == BASE:
                        calls = found.setdefault(path.removeprefix(BASE).removeprefix("."), {})
                        calls.setdefault(key, []).append(node)
        self._found = {path: [_Region(frozenset(n)) for n in calls.values()] for path, calls in found.items()}

    def of(self, path: str) -> list[_Region]:
        """Return the regions of a module, one for each of its calls."""
        return self._found.get(path, [])

    def around(self, path: str, node: fx.Node) -> _Region | None:
        """Return the region of the module's call that runs this node, or None."""
        return next((region for region in self.of(path) if node in region.nodes), None)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
