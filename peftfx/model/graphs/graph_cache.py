"""The graphs of one base: captured once for each kind of call, derived once for each tuple of active adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from peftfx.adapters.adapter_set import AdapterSet
from peftfx.bases.processors.image_size import Size
from peftfx.bases.processors.pictures import chosen_size
from peftfx.bases.processors.videos import takes_videos
from peftfx.errors import PeftfxError
from peftfx.graph.conditions import unmet
from peftfx.graph.contexts import fake_mode_of, keeping_activations
from peftfx.graph.decisions import opposed
from peftfx.graph.graph import ADAPTERS, Graph, path_name
from peftfx.hosting.call_inputs import refuse_unsettled
from peftfx.model.graphs.fingerprints import ModelState, value_key
from peftfx.model.graphs.late_modules import refuse_late, refuse_missed
from peftfx.model.graphs.runs import Runs
from peftfx.passes.adaptation.evaluate import evaluate
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.adaptation.prefill import Left, Prefill
from peftfx.passes.base import Pass
from peftfx.passes.manager import PassManager
from peftfx.patterns.find import with_patterns
from peftfx.patterns.pattern import version as patterns_version
from peftfx.views.arguments import named_tensors
from peftfx.views.cache_prefix import Prefilled
from peftfx.views.capture import capture
from peftfx.views.decode import Decode
from peftfx.views.entry import Entry
from peftfx.views.finding.named_views import find_view
from peftfx.views.finding.of_sites.layers import Widened
from peftfx.views.forward_axes import axes_of_forward
from peftfx.views.images.sizes import with_fixed_sizes
from peftfx.views.view import Axes, View, apart

MOST_STATES = 4  #: the most states of the base for one kind of call: training, evaluation, and two more
_MOST = 16  #: the most graphs for one kind of call, for sizes at which the model's code computes something else


class Graphs:
    """The graphs that were captured from `base` and derived with `adapters`; each is made when first asked for.

    A captured graph serves a later call that has the same view, the same entry into the base, the same names, dtypes
    and ranks of tensors, and the same values of all other arguments. The base must also have the same state: attributes
    that its code may read, the mode of each module, and hooks.
    """

    def __init__(self, base: nn.Module, adapters: AdapterSet) -> None:
        self.base, self.adapters = base, adapters
        self._captured: dict[object, list[tuple[ModelState, list[Graph]]]] = {}
        self._derived: dict[object, tuple[Graph, Graph]] = {}  # captured, derived: the key has its id
        self.runs = Runs()
        self._views: dict[tuple[str, Size | None, bool], View | None] = {}
        self._patterns = patterns_version()

    def view(self, name: str) -> View | None:
        """Return the base's view of this name, or None for the forward."""
        key = name, chosen_size(), takes_videos()
        if key not in self._views:
            self._views[key] = find_view(self.base, name)
        return self._views[key]

    def captured(
        self,
        inputs: Mapping[str, object],
        entry: Entry | None = None,
        view: View | None = None,
        *,
        exact: bool = False,
    ) -> Graph:
        """Return the base's graph for such a call, by its own forward or by another entry without its prompt.

        The graph holds for the sizes of this call, and has the sides of branches that this call takes. A size of 1
        counts as one of many sizes. With `exact`, a separate graph is captured for a size of 1 if the model's code has
        a branch for that size. If the code asks whether an axis is empty, calls with an empty axis have a graph of
        their own.
        """
        self._find_patterns()
        tensors = named_tensors(inputs)
        known, alone = self._known(inputs, entry, view), frozenset[str]()
        for graph in known:
            if not all(s.accepts(tensors[s.name]) for s in graph.inputs) or graph.mixed(tensors) is not None:
                continue
            sizes = graph.sizes_of(tensors)
            if opposed(graph.decisions, tensors) or unmet(graph.filled, sizes):
                continue
            broken = unmet(graph.conditions, sizes, edges=exact)
            if not broken:
                return graph
            alone |= {axis for condition in broken for axis in condition.axes if sizes[axis] == 1}
        graph = self._capture(inputs, tensors, entry, view, alone)
        self._remember(known, graph)
        if alone:
            return graph
        if not all(s.accepts(tensors[s.name]) for s in graph.inputs):  # the graph fixes a size that replaced 1
            axes = self._axes(inputs, tensors, view)
            sizes = _sizes(_all_named(axes, tensors), tensors)
            known[-1] = self._capture(inputs, tensors, entry, view, frozenset(a for a, n in sizes.items() if n == 1))
            return known[-1]
        if unmet(graph.conditions, graph.sizes_of(tensors), edges=exact):  # the replacing size takes another branch
            return self.captured(inputs, entry, view, exact=exact)
        return graph

    def _find_patterns(self) -> None:
        """Search the captured graphs for the patterns that have been registered since the last search."""
        if self._patterns != patterns_version():
            self._patterns = patterns_version()
            for graph in (graph for states in self._captured.values() for _, known in states for graph in known):
                graph.sites = with_patterns(graph, graph.sites)

    def _capture(
        self,
        inputs: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        entry: Entry | None,
        view: View | None,
        alone: frozenset[str],
    ) -> Graph:
        """Capture a new graph; the axes in `alone` keep the sizes that they have in this call.

        An axis of size 1 without a name (positions that all rows share, for example) also keeps its size if the capture
        with free sizes fails.
        """
        axes = self._axes(inputs, tensors, view)
        named = _all_named(axes, tensors)
        if alone:
            axes = {n: tuple(None if a in alone else a for a in own) for n, own in named.items()}
        try:
            with keeping_activations(self.base):
                return capture(self.base, inputs, axes=axes, entry=entry, call=view)
        except PeftfxError:
            places = {f"{name}.{i}" for name, own in named.items() for i in range(len(own))}
            shared = frozenset(a for a, size in _sizes(named, tensors).items() if size == 1 and a in places)
            if shared <= alone:
                raise
        return self._capture(inputs, tensors, entry, view, alone | shared)

    def _axes(self, inputs: Mapping[str, object], tensors: Mapping[str, Tensor], view: View | None) -> Axes:
        """Return the names of the axes of such a call; in images that the code takes in one size, sides have none."""
        own = {} if view is None else apart(view.axes, tensors)
        if view is not None and not (isinstance(view, Widened) and view.view is None):
            return own
        call = {name: value for name, value in inputs.items() if name not in own}
        return {**with_fixed_sizes(axes_of_forward(self.base, call), self.base, call), **own}

    def _remember(self, known: list[Graph], graph: Graph) -> None:
        if len(known) == _MOST:
            what = f"this model's code computes another program for each of more than {_MOST} kinds of sizes"
            warnings.warn(f"{what}; each is captured when a call needs it, and the first are forgotten", stacklevel=2)
            del known[0]
            self.forget_derived()
        known.append(graph)

    def adapted(
        self,
        inputs: Mapping[str, object],
        entry: Entry | None,
        view: View | None,
        names: Sequence[str],
        *,
        exact: bool = False,
    ) -> Graph:
        """Return the graph for such a call with the adapters of these names, in their present state; see `captured`."""
        refuse_unsettled({name: self.adapters[name].rules for name in names})
        captured = self.captured(inputs, entry, view, exact=exact)
        if not names:
            return captured
        if isinstance(entry, Prefilled) and isinstance(view, Decode):
            through = self.derived(self.captured(inputs, entry.tokens, view, exact=exact), names)
            found = self.derived(captured, names, Prefill(Left(through, view, entry)))
        else:
            found = self.derived(captured, names)
        if found.derived and not isinstance(fake_mode_of(self.base), FakeTensorMode):
            evaluate(found)  # the adapters may have changed
        return found

    def keep(self, graph: Graph, inputs: Mapping[str, object], view: View | None = None) -> None:
        """Cache a graph that was captured, with these inputs, from the base in its present state."""
        if view is not None:
            self._views[view.name, chosen_size(), takes_videos()] = view
        self._known(inputs, None, view).append(graph)

    def capture_with(self, inputs: Mapping[str, object], axes: Axes, entry: Entry | None = None) -> Graph:
        """Capture the forward with these names of axes, and cache the graph for calls like this one."""
        with keeping_activations(self.base):
            graph = capture(self.base, inputs, axes=axes, entry=entry)
        self._known(inputs, entry, None).append(graph)
        return graph

    def derived(self, captured: Graph, names: Sequence[str], *more: Pass) -> Graph:
        """Return a captured graph with the adapters of these names inserted in order, after the passes `more`."""
        key = (id(captured), tuple(names), tuple(t.dtype for name in names for _, t in self.adapters[name].tensors()))
        if key not in self._derived:
            for name in names:
                refuse_late(self.base, self.adapters[name], captured.sites)
                refuse_missed(self.adapters[name], captured)
            linked = captured.clone()
            linked.module.add_module(ADAPTERS, self.adapters.module)
            inserts = [Insert(name, self.adapters[name]) for name in names]
            try:
                self._derived[key] = captured, PassManager([*inserts, *more], check="none")(linked).graph
            except PeftfxError:
                self._captured.clear()  # the failed method may have bound a size, for all graphs of this capture
                raise
        return self._derived[key][1]

    def forget_derived(self) -> None:
        """Drop the derived graphs, because an adapter in them has been removed."""
        self._derived.clear()
        self.runs.forget()

    def forget(self) -> None:
        """Drop all graphs, because the base has changed."""
        self._captured.clear()
        self._views.clear()
        self.forget_derived()

    def _known(self, inputs: Mapping[str, object], entry: Entry | None, view: View | None) -> list[Graph]:
        """Return the graphs for calls like this one of the base in its present state; they differ in sizes.

        The model fixes their sizes, or its code computes something else at these sizes.
        """
        leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
        kinds = [
            (path_name(p), v.dtype, v.ndim) if isinstance(v, Tensor) else (path_name(p), value_key(v))
            for p, v in leaves
        ]
        states = self._captured.setdefault((view, tuple(kinds), entry), [])
        for state, graphs in states:
            if state.holds():
                return graphs
        if len(states) == MOST_STATES:
            what = f"{states[-1][0].difference()} of the model, or of its parts, has changed again"
            warnings.warn(f"{what}: each change of what its code reads makes a new graph", stacklevel=2)
            del states[0]
            self.forget_derived()
        states.append((ModelState(self.base), []))
        return states[-1][1]


def _all_named(axes: Axes, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str | None, ...]]:
    """Return a name for every axis: an axis without a name of its own gets its tensor's name and its number."""
    return {n: axes.get(n) or tuple(f"{n}.{i}" for i in range(t.ndim)) for n, t in tensors.items()}


def _sizes(axes: Axes, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {a: n for name, own in axes.items() for a, n in zip(own, tensors[name].shape, strict=True) if a is not None}
