"""Return what a pattern computes as further outputs of a graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult, output_nodes
from peftfx.patterns.pattern import Pattern


@dataclass(frozen=True)
class Probe(Pass):
    """Let a graph return what a pattern computes, after its own outputs.

    The graph's result is then a dict: its own outputs by name, unchanged, and `probe.<module>` for each match, with a
    number at the end if a module has several matches.

    Attributes:
        pattern: the pattern to look for.
        name: the prefix of the new outputs' names.
    """

    pattern: Pattern
    name: str = "probe"

    def __call__(self, graph: Graph) -> PassResult:
        """Add an output for each match.

        Raises:
            PeftfxError: an output already has such a name.
        """
        new = graph.clone()
        matches = list(self.pattern.matches(new))
        if not matches:
            return PassResult(graph, 0)
        names = list(new.outputs)
        for match in matches:
            name = f"{self.name}.{match.module}".removesuffix(".")
            number = sum(own == name or own.startswith(f"{name}:") for own in names)
            names.append(f"{name}:{number}" if number else name)
        if len(set(names)) < len(names):
            raise PeftfxError("two outputs have one name", self.name, "give the probe another name")
        values = [*output_nodes(new), *(match.y for match in matches)]
        (output,) = new.module.graph.find_nodes(op="output")
        output.args = (tuple(values),)
        new.out_spec = pytree.tree_structure(dict.fromkeys(names, 0))
        Rewriter(new.module.graph).close(new)
        return PassResult(new, len(matches))
