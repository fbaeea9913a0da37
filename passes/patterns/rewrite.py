"""Replace what a pattern computes by another function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from peftfx.errors import PeftfxError, nearest
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult
from peftfx.patterns.match import Match
from peftfx.patterns.pattern import Pattern


@dataclass(frozen=True)
class Rewrite(Pass):
    """Replace a pattern by a function, at each match.

    Attributes:
        pattern: the pattern to replace.
        by: a plain torch function. Its arguments are some of the pattern's, by name. It returns a tensor of the shape
            and dtype that the pattern's function returns.
        exact: whether the function computes the same, which the manager's numeric level checks.
    """

    pattern: Pattern
    by: Callable[..., Tensor]
    exact: bool = False
    requires = ("merged",)

    @property
    def preserves(self) -> bool:  # type: ignore[override]
        """Whether the function is said to compute the same."""
        return self.exact

    def __call__(self, graph: Graph) -> PassResult:
        """Rewrite all matches in a copy of `graph`.

        Raises:
            PeftfxError: the function has an argument that a match lacks, or returns another shape or dtype.
        """
        new = graph.clone()
        matches = list(self.pattern.matches(new))
        rewriter, became = Rewriter(new.module.graph), dict[fx.Node, fx.Node]()
        for match in matches:
            became[match.y] = self._put(rewriter, match, became)
        for node in sorted({n for match in matches for n in match.inner}, reverse=True):
            if not node.users:
                rewriter.erase(node)
        rewriter.close(new)
        return PassResult(new, len(matches)) if matches else PassResult(graph, 0)

    def _put(self, rewriter: Rewriter, match: Match, became: dict[fx.Node, fx.Node]) -> fx.Node:
        name = getattr(self.by, "__name__", "the function")
        wanted = list(inspect.signature(self.by).parameters)
        known = (*match.operands, *match.numbers)
        if lost := next((own for own in wanted if own not in known), None):
            what = f"{name} has an argument {lost!r}, and this match of {self.pattern.name} has not"
            raise PeftfxError(what, match.module, nearest(lost, known) or f"it has {', '.join(known)}")
        tensors = [own for own in wanted if own in match.operands]

        def call(*values: Tensor) -> Tensor:
            return self.by(**dict(zip(tensors, values, strict=True)), **numbers)

        numbers = {own: match.numbers[own] for own in wanted if own in match.numbers}
        nodes = [became.get(match.operands[own], match.operands[own]) for own in tensors]
        key = ("rewrite", self.pattern.name, id(self.by), tensors, numbers)
        made = rewriter.before(match.y).trace(call, *nodes, key=key, what=name, where=match.module)
        if not isinstance(made, fx.Node) or _kind(made) != _kind(match.y):
            got = _kind(made) if isinstance(made, fx.Node) else type(made).__name__
            what = f"{name} gives {got}, and {self.pattern.name} gives {_kind(match.y)}"
            raise PeftfxError(what, match.module, "give a tensor of that shape and dtype")
        rewriter.replace(match.y, made)
        return made


def _kind(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype}{list(value.shape)}"
