"""The oracle that an export is compared with, and its calls. It is the model's own code if that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.verification.captured import refused
from peftfx.export.verification.cases import is_heavy
from peftfx.export.verification.comparison import Reference, reference_of
from peftfx.export.verification.eager.adapters import unpublished
from peftfx.export.verification.eager.reference import EagerReference, no_oracle
from peftfx.export.verification.probes import probes, view_cases
from peftfx.export.verification.sizes.limits import EVERY, Sizes
from peftfx.export.verification.tolerances.float64 import MOST_EXACT
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.views.view import View

EAGER = "the model's own code"


@dataclass
class Oracle:
    """A reference, and the calls at which an export is compared with it.

    Attributes:
        reference: computes what the export has to give.
        cases: the calls.
        measured: the numbers of the calls that are also run in float64.
        told: what the reference is, in one line.
        eager: the reference as an `EagerReference`, if it is the model's own code; otherwise None.
        empty: slots whose tensors in the first call change nothing, and are left out of it in ONNX Runtime.
        rows: the numbers of calls in whose rows all adapters are; empty if rows choose none.
    """

    reference: Reference
    cases: list[Tensors]
    measured: frozenset[int]
    told: str
    eager: EagerReference | None = None
    empty: frozenset[str] = frozenset()
    rows: tuple[int, ...] = ()

    @property
    def largest(self) -> Tensors:
        """The largest of the calls that are also run in float64."""
        return max((self.cases[i] for i in self.measured), key=numbers_in)

    @property
    def held(self) -> list[Tensors]:
        """The calls that are also compared where nothing is rounded."""
        return [self.cases[i] for i in self.rows] or [self.largest]

    @property
    def idle(self) -> set[str]:
        """The module paths at which adapters act and which no call has run."""
        return set() if self.eager is None else self.eager.named - self.eager.seen


def eager_oracle(
    adapted: AdaptedModel, graph: Graph, view: View | None, example: Mapping[str, object], sizes: Sizes = EVERY
) -> Oracle:
    """Make the oracle: the model's own code with its active adapters; if they have no eager form, their graph.

    Raises:
        PeftfxError: the model takes none of the sizes that were tried.
        VerificationError: an adapter's file has tensors for a module that runs, and no rule acts there.
    """
    eager = EagerReference(adapted, view, example)
    why = no_oracle(adapted)
    asked = Remembered(reference_of(graph) if why else named_in(graph, eager))
    if view is None:
        cases = probes(adapted, graph.inputs, example, None if why else asked.first, sizes)
    else:
        try:
            runs = {view: asked}
            cases = view_cases(adapted, view, lambda v, feed: _run(adapted, v, runs, why)(dict(feed)), sizes)
            for case in cases:
                asked.first(case)
        except PeftfxError:
            raise
        except Exception as error:  # a model's own code raises various errors
            raise_if_memory_is_out(error)
            raise refused(adapted, view, error) from error
    return Oracle(asked, cases, measured_of(adapted, cases, graph), _told(adapted, why), None if why else eager)


def _told(adapted: AdaptedModel, why: str) -> str:
    """Say what the reference is. `why` says why it is not the model's own code."""
    if why:
        return f"the adapted graph: {why}"
    own = unpublished(adapted.named.acting())
    by_forward = f", {' and '.join(own)} by its own `forward`" if own else ""
    return f"{EAGER}, with the adapter on its modules{by_forward}" if adapted.active else EAGER


def _run(adapted: AdaptedModel, view: View, runs: Mapping[View, Reference], why: str) -> Reference:
    if view in runs:
        return runs[view]
    return reference_of(adapted.graph(view=view)) if why else EagerReference(adapted, view)


def named_in(graph: Graph, reference: Reference) -> Reference:
    """Return a reference whose outputs have the names that the graph's outputs have in ONNX."""
    names = dict(zip(graph.outputs, onnx_outputs(graph), strict=True))
    return lambda feed: {names.get(name, name): value for name, value in reference(feed).items()}


def measured_of(adapted: AdaptedModel, cases: Sequence[Tensors], graph: Graph) -> frozenset[int]:
    """Return the numbers of the calls to run in float64, too: those that compute most, fewer for a larger model.

    A call in float64 widens every weight. For a model of 100M parameters this takes most of a second. At least one call
    is always measured. A long text computes more than a few tokens behind a long cache, whose numbers are only read: so
    whole numbers, of tokens and masks, count before all others. Of heavy calls only the smallest is measured.

    Args:
        adapted: the model.
        cases: the calls.
        graph: the graph that is exported.
    """
    if is_heavy(graph):
        return frozenset({min(range(len(cases)), key=lambda i: numbers_in(cases[i]))})
    parameters = sum(p.numel() for p in adapted.base.parameters())
    count = max(1, MOST_EXACT // max(1, parameters))
    whole = [sum(v.numel() for v in case.values() if not v.is_floating_point()) for case in cases]
    first = sorted(range(len(cases)), key=lambda i: (-whole[i], -numbers_in(cases[i])))
    return frozenset(first[:count])


def numbers_in(case: Tensors) -> int:
    """Return how many numbers a call has."""
    return sum(value.numel() for value in case.values())


@dataclass
class Remembered:
    """A reference that keeps its answers to tried calls, so that they are not computed again.

    A call is identified by the ids of its tensors. The tensors are kept with the answer, so that no other tensor can
    get their ids.
    """

    reference: Reference
    kept: dict[frozenset[tuple[str, int]], tuple[Tensors, Tensors]] = field(default_factory=dict)

    def first(self, feed: Tensors) -> Tensors:
        """Try a call, keep its answer, and return it."""
        answer = self.reference(feed)
        self.kept[_identity(feed)] = feed, answer
        return answer

    def __call__(self, feed: Tensors) -> Tensors:
        found = self.kept.pop(_identity(feed), None)
        return self.reference(feed) if found is None else found[1]


def _identity(feed: Tensors) -> frozenset[tuple[str, int]]:
    return frozenset((name, id(value)) for name, value in feed.items())
