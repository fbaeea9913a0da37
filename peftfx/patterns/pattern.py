"""pattern: a plain torch function whose computation a graph is searched for; what matches is a site."""

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
    """Where a graph came close to a pattern.

    Attributes:
        module: path of the module whose code it is.
        node: the first that did not match, by its name in the graph.
        why: what was expected, and what is there.
        matched: how many nodes of the pattern did match.
    """

    module: str
    node: str
    why: str
    matched: int

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.why} (%{self.node})"


@dataclass(eq=False)
class Pattern:
    """What a user's function computes, to be found in graphs. Made by `peftfx.pattern`.

    Attributes:
        role: of the sites that matches are.
        name: the function's.
        where: a condition on a match, which its operators do not tell.
        spellings: the ways to write it, tried in order.
    """

    role: str
    name: str
    where: Callable[[Match], bool] | None = None
    spellings: list[Spelling] = field(default_factory=list, repr=False)

    def also(self, **axes: str) -> Callable[[Callable[..., object]], Pattern]:
        """Another spelling of the same, whose first argument is the same too; a decorator, as `peftfx.pattern`.

        Args:
            axes: the names of the axes of each argument, as in `peftfx.pattern`.
        """

        def add(function: Callable[..., object]) -> Pattern:
            self.spellings.append(spell(function, axes))
            _version[0] = next(_VERSIONS)
            return self

        return add

    def matches(self, graph: Graph) -> Iterator[Match]:
        """Where a graph computes this, in order; a node ends one match at most.

        Raises:
            PeftfxError: the condition fails with an error of its own.
        """
        ends, traces = self._ends(), Traces()
        for node in graph.nodes():
            if node.op == "call_function" and op_name(node) in ends:
                found = self._at(node, Trail(), traces)
                if found is not None:
                    yield found

    def explain(self, graph: Graph) -> list[NearMiss]:
        """Where a graph came close, furthest first: one for each node that could have ended a match, and did not."""
        found, traces = list[NearMiss](), Traces()
        ends = self._ends()
        for node in graph.nodes():
            if node.op != "call_function" or op_name(node) not in ends:
                continue
            trail = Trail(whole=True)
            if self._at(node, trail, traces) is None and trail.node is not None:
                found.append(NearMiss(module_path(node), trail.node.name, trail.why, trail.reached))
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
    """Make a pattern of a plain torch function; a decorator.

        @peftfx.pattern("mlp.swiglu", x="batch length width", gate="inner width", up="inner width", down="width inner")
        def swiglu(x, gate, up, down):
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    From then on each captured graph is searched for it, and what matches is a site of kind `pattern`. A pattern of the
    same name, in a notebook say, takes the place of the one before.

    Args:
        role: of such sites, as targets name it; a word or words with dots, and no role of peftfx's own.
        where: a condition on a match.
        axes: for each tensor argument, the names of its axes; see `peftfx.patterns.spelling.spell`. The number of axes
            is an example: operators match whatever there are.

    Raises:
        PeftfxError: the function cannot be traced, or the role is one of peftfx's.
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
    """Search graphs for these patterns no more."""
    for name in names:
        _known.pop(name, None)
    _version[0] = next(_VERSIONS)


def remember(known: Pattern) -> None:
    """Search graphs for a pattern from now on, if they are not searched for it already."""
    if _known.get(known.name) is not known:
        _known[known.name] = known
        _version[0] = next(_VERSIONS)


def known_patterns() -> tuple[Pattern, ...]:
    """The patterns that graphs are searched for."""
    return tuple(_known.values())


def version() -> int:
    """A number that is another one after each change of what is searched for."""
    return _version[0]
