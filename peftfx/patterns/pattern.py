"""Pattern: a plain torch function whose computation is searched for in graphs. Each match is a site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from torch import fx

from peftfx.analysis.dataflow import op_name
from peftfx.analysis.weight_ops import module_path
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.patterns.match import Match, Trail, uncast
from peftfx.patterns.matching import Traces, match_at, refuse_own
from peftfx.patterns.spelling import Spelling, spell
from peftfx.sites.expression import is_role
from peftfx.sites.site import ROLES

_VERSIONS = count(1)
_known: dict[str, Pattern] = {}
_version = [0]


@dataclass(frozen=True)
class NearMiss:
    """A place where a graph came close to a pattern.

    Attributes:
        module: the path of the module whose code came close.
        node: the name of the first node in the graph that did not match.
        why: what was expected, and what was found.
        matched: how many nodes of the pattern matched.
    """

    module: str
    node: str
    why: str
    matched: int

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.why} (%{self.node})"


@dataclass(eq=False)
class Pattern:
    """A user's function, to be found in graphs. It is made by `peftfx.pattern`.

    Attributes:
        role: the role of the sites at the matches.
        name: the function's name.
        where: a condition on a match, for what the operators do not show.
        spellings: the functions that compute the pattern, tried in order.

    Examples:
        >>> graph = peftfx.capture(model)
        >>> relu = peftfx.pattern("activation.relu", x="batch length width")(lambda x: torch.relu(x))
        >>> list(relu.matches(graph)), relu.explain(graph)
        ([], [])
    """

    role: str
    name: str
    where: Callable[[Match], bool] | None = None
    spellings: list[Spelling] = field(default_factory=list, repr=False)

    def also(self, **axes: str) -> Callable[[Callable[..., object]], Pattern]:
        """Decorate another function that computes the same, with the same first argument, as a second spelling.

        Args:
            axes: the names of the axes of each argument, as in `peftfx.pattern`.
        """

        def add(function: Callable[..., object]) -> Pattern:
            self.spellings.append(spell(function, axes))
            _version[0] = next(_VERSIONS)
            return self

        return add

    def matches(self, graph: Graph) -> Iterator[Match]:
        """Yield the places where a `graph` computes this pattern, in order. A node ends at most one match.

        Raises:
            PeftfxError: the condition `where` raises an error.
        """
        ends, traces = self._ends(), Traces()
        for node in graph.nodes():
            if node.op == "call_function" and op_name(node) in ends:
                found = self._at(node, Trail(), traces)
                if found is not None:
                    yield found

    def explain(self, graph: Graph) -> list[NearMiss]:
        """Return the near misses in a `graph`, the closest first: one for each node that could have ended a match.

        Nodes inside a match are left out.
        """
        found, traces, matched = list[NearMiss](), Traces(), set[fx.Node]()
        ends = self._ends()
        for node in reversed(list(graph.nodes())):  # the end of a match comes before its inner nodes
            if node.op != "call_function" or op_name(node) not in ends or node in matched:
                continue
            trail = Trail(whole=True)
            match = self._at(node, trail, traces)
            if match is not None:
                matched |= set(match.inner)
            elif trail.node is not None:
                found.append(NearMiss(module_path(node), trail.node.name, trail.why, trail.reached))
        found.reverse()
        return sorted(found, key=lambda miss: -miss.matched)

    def _ends(self) -> set[str]:
        return {op_name(uncast(spelling.output)) for spelling in self.spellings}

    def _at(self, node: fx.Node, trail: Trail, traces: Traces) -> Match | None:
        for spelling in self.spellings:
            found = match_at(spelling, node, trail, traces)
            if found is not None and self._holds(found):
                return found
            if found is not None:
                trail.ended(len(found.inner), node, "the pattern's condition, where=, does not hold")
        return None

    def _holds(self, match: Match) -> bool:
        if self.where is None:
            return True
        try:
            return bool(self.where(match))
        except Exception as error:
            raise refuse_own(error, self.name) from error


def pattern(
    role: str, *, where: Callable[[Match], bool] | None = None, **axes: str
) -> Callable[[Callable[..., object]], Pattern]:
    """Make a pattern of a plain torch function. This is a decorator.

    From then on each captured graph is searched for the pattern, and each match is a site of kind `pattern`. A new
    pattern with the same name, as in a notebook, replaces the old one.

    Args:
        role: the role of these sites, for targets: a word, or words with dots, but no role of peftfx's own.
        where: a condition on a match.
        axes: for each tensor argument, the names of its axes; see `peftfx.patterns.spelling.spell`. The number of axes
            is only an example: operators match any number of axes.

    Raises:
        PeftfxError: the function cannot be traced, or the role is one of peftfx's.

    Examples:
        >>> axes = {"x": "batch length width", "gate": "inner width", "up": "inner width", "down": "width inner"}
        >>> @peftfx.pattern("mlp.swiglu", **axes)
        ... def swiglu(x, gate, up, down):
        ...     return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        >>> [site.path for site in peftfx.inspect(model).filter(role="mlp.swiglu")]
        ['model.layers.0.mlp.swiglu.0']
    """
    words = role.split(".")
    if is_role(role) or not all(word.replace("_", "a").isalnum() for word in words):
        what = f"{role!r} is no name for a pattern's role"
        raise PeftfxError(what, "pattern", f"take a name of your own, as mlp.swiglu; peftfx has {', '.join(ROLES)}")

    def make(function: Callable[..., object]) -> Pattern:
        made = Pattern(role, getattr(function, "__name__", words[-1]), where, [spell(function, axes)])
        _known[made.name] = made
        _version[0] = next(_VERSIONS)
        return made

    return make


def forget(names: Iterable[str]) -> None:
    """Stop searching graphs for the patterns of these `names`."""
    for name in names:
        _known.pop(name, None)
    _version[0] = next(_VERSIONS)


def remember(known: Pattern) -> None:
    """Search graphs for the pattern `known` from now on."""
    if _known.get(known.name) is not known:
        _known[known.name] = known
        _version[0] = next(_VERSIONS)


def known_patterns() -> tuple[Pattern, ...]:
    """Return the patterns that graphs are searched for."""
    return tuple(_known.values())


def version() -> int:
    """Return a number that changes whenever the set of known patterns changes."""
    return _version[0]
