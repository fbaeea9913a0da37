"""The graphs of one base: captured once for each kind of call, and derived once for each set of active adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from peftfx.adapters.adapter_set import AdapterSet
from peftfx.errors import PeftfxError
from peftfx.graph.contexts import fake_mode_of
from peftfx.graph.graph import ADAPTERS, Graph, path_name
from peftfx.passes.adaptation.evaluate import evaluate
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.adaptation.prefill import Left, Prefill
from peftfx.passes.base import Pass, PassManager
from peftfx.passes.optimization.dead_code import Sweep
from peftfx.views.cache_prefix import Prefilled
from peftfx.views.capture import capture
from peftfx.views.decode import Decode
from peftfx.views.entry import Entry
from peftfx.views.named_views import find_view
from peftfx.views.view import View


class Graphs:
    """What was captured from `base` and derived with its `adapters`; made when it is first asked for.

    A captured graph is found again by what a call like it must have in common: the view, the names, dtypes and ranks of
    its tensors, the values of all else, the mode of each module, and the way into the base.
    """

    def __init__(self, base: nn.Module, adapters: AdapterSet) -> None:
        self.base, self.adapters = base, adapters
        self._captured: dict[object, list[Graph]] = {}
        self._derived: dict[object, Graph] = {}
        self._swept: dict[int, tuple[Graph, Graph]] = {}  # both: a number is of an object that lives
        self._views: dict[str, View | None] = {}

    def view(self, name: str) -> View | None:
        """The base's view of this name; `None` for the forward."""
        if name not in self._views:
            self._views[name] = find_view(self.base, name)
        return self._views[name]

    def captured(self, inputs: Mapping[str, object], entry: Entry | None = None, view: View | None = None) -> Graph:
        """The base's graph for such a call, by its own forward or by another way into it; an entry's hole is empty."""
        leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
        tensors = {path_name(p): v for p, v in leaves if isinstance(v, Tensor)}
        known = self._known(inputs, entry, view)
        for graph in known:
            if all(s.accepts(tensors[s.name]) for s in graph.inputs):
                return graph
        shown = {} if view is None else {"axes": view.axes, "call": view}
        known.append(capture(self.base, inputs, entry=entry, **shown))  # type: ignore[arg-type]
        return known[-1]

    def adapted(
        self, inputs: Mapping[str, object], entry: Entry | None, view: View | None, names: Sequence[str]
    ) -> Graph:
        """The graph for such a call under the adapters of these names, as they are now."""
        captured = self.captured(inputs, entry, view)
        if not names:
            return captured
        if isinstance(entry, Prefilled) and isinstance(view, Decode):
            through = self.derived(self.captured(inputs, entry.tokens, view), names)
            found = self.derived(captured, names, Prefill(Left(through, view, entry)))
        else:
            found = self.derived(captured, names)
        if found.derived and not isinstance(fake_mode_of(self.base), FakeTensorMode):
            evaluate(found)  # the adapters may have changed
        return found

    def keep(self, graph: Graph, inputs: Mapping[str, object]) -> None:
        """Keep a graph that was captured from the base, as it is now, with these inputs."""
        self._known(inputs, None, None).append(graph)

    def derived(self, captured: Graph, names: Sequence[str], *more: Pass) -> Graph:
        """A captured graph with the adapters of these names in it, in order, and what more passes make of that."""
        key = (id(captured), tuple(names))
        if key not in self._derived:
            linked = captured.clone()
            linked.module.add_module(ADAPTERS, self.adapters.module)
            inserts = [Insert(name, self.adapters[name]) for name in names]
            try:
                self._derived[key] = PassManager([*inserts, *more], check="none")(linked)
            except PeftfxError:
                self._captured.clear()  # a method that asked for a size has bound it, for all graphs of this capture
                raise
        return self._derived[key]

    def swept(self, graph: Graph) -> Graph:
        """One of these graphs without what it computes and nobody uses, to be run and nothing else."""
        if graph.derived:  # such weights are computed anew, and given to the graph itself
            return graph
        if id(graph) not in self._swept:
            self._swept[id(graph)] = graph, Sweep()(graph).graph
        return self._swept[id(graph)][1]

    def forget_derived(self) -> None:
        """An adapter has gone: drop the graphs that may hold it."""
        self._derived.clear()
        self._swept.clear()

    def forget(self) -> None:
        """The base has changed: drop all."""
        self._captured.clear()
        self._views.clear()
        self.forget_derived()

    def _known(self, inputs: Mapping[str, object], entry: Entry | None, view: View | None) -> list[Graph]:
        """The graphs captured for calls like this one; they differ in the sizes of axes that the model fixes."""
        leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
        kinds = [
            (path_name(p), v.dtype, v.ndim) if isinstance(v, Tensor) else (path_name(p), repr(v)) for p, v in leaves
        ]
        modes = tuple(module.training for module in self.base.modules())
        return self._captured.setdefault((view, tuple(kinds), modes, entry), [])
