"""The class `HostedBase`: a base, its sites, and the road on which calls run the adapters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.adapter_set import AdapterSet
from peftfx.adapters.base_writer import Ledger
from peftfx.errors import PeftfxError, warn
from peftfx.graph.contexts import evaluating
from peftfx.graph.graph import Graph
from peftfx.hosting.road import GRAPH_ASKED, ModulesRoad
from peftfx.hosting.seating import seat
from peftfx.hosting.seats import Seating
from peftfx.model.graphs.graph_cache import Graphs
from peftfx.model.graphs.late_modules import may_run_late, refuse_wrapped
from peftfx.model.graphs.runs import Checkpoints
from peftfx.model.hosted.shared_base import shared
from peftfx.model.trainers.seen_by_trainers import SeenByTrainers
from peftfx.patterns.pattern import version
from peftfx.sites.sites import Sites
from peftfx.twins.twin import Twin
from peftfx.views.finding.of_sites.layers import Widened, lone_call
from peftfx.views.view import View

ROADS = ("modules", "graph")


class HostedBase(SeenByTrainers):
    """A base, shared and frozen, and its adapters, which calls run in the base's own modules or in a graph.

    Args:
        base: the model.
        sites: where adapters can act.
        example: the arguments of an example call of the base, by name.
        wanted: the road that calls take, `modules` or `graph`; with None, the modules if they can host all that acts.
        twin: the twin of the base, if there is one already.
    """

    def __init__(
        self,
        base: nn.Module,
        sites: Sites,
        example: Mapping[str, object],
        wanted: str | None = None,
        twin: Twin | None = None,
    ) -> None:
        super().__init__()
        refuse_other_road(wanted)
        # The adapters come before the base, whose modules hold the same tensors: so tensors get the adapters' names.
        self.adapters = nn.Module()
        self.base, self.example, self.wanted = base, dict(example), wanted
        self._sites: Sites | None = sites
        self._patterns = version()
        self.named = AdapterSet(self.adapters)
        self._twin = Twin(base) if twin is None else twin
        self.whole: str | View = "forward"  #: the view, or its name, that runs all of the base
        self.graphs = Graphs(self.source, self.named)
        self.modules_road = ModulesRoad(base, self.named)
        self._shared = shared(base, self)
        self.ledger: Ledger | None = None
        self.checkpoints: Checkpoints | None = None
        self.training = base.training

    @abstractmethod
    def graph(
        self, inputs: Mapping[str, object] | None = None, *, adapted: bool = True, view: str | View = "forward"
    ) -> Graph:
        """Return the graph of a call in a view, by default of an example call."""

    def whole_graph(self, *, adapted: bool = True) -> Graph:
        """Return the graph of an example call that runs all of the base; its forward alone may not be captured.

        Args:
            adapted: whether the active adapters act in it.
        """
        whole, inputs = self.whole, None
        if isinstance(whole, Widened) and whole.view is None:
            inputs = {**self.example, **whole.inputs(self.source)}
        return self.graph(inputs, adapted=adapted, view=whole)

    @property
    def idle_layers(self) -> frozenset[str]:
        """The paths of the layers with sites that the example call does not run, or whose results it does not use."""
        return self.whole.paths if isinstance(self.whole, Widened) else frozenset()

    def widen_sites(self, paths: Iterable[str]) -> None:
        """Let adapters act at torch's own layers that the example call does not run, or whose results it does not use.

        Each of them is captured by itself, beside the call. On the graph road nothing changes.

        Args:
            paths: the layers' paths.
        """
        found = (lone_call(self.source.get_submodule(path), path) for path in paths)
        calls = tuple(call for call in found if call is not None)
        if not calls or self.wanted == "graph":
            return
        if isinstance(self.whole, Widened):
            self.whole = replace(self.whole, calls=(*self.whole.calls, *calls))
        else:
            self.whole = Widened(calls, self.graphs.view(self.whole) if isinstance(self.whole, str) else self.whole)
        self._sites = None

    @abstractmethod
    def run_other(self, call: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Run a call whose `forward` other code has set, as TRL does, with the active adapters."""

    @property
    def source(self) -> nn.Module:
        """The base with readable weights: the base itself, or its twin if weights are quantised (`peftfx.twins`)."""
        return self._twin.module

    @property
    def sites(self) -> Sites:
        """The sites of the base in its present state: a merge can change a shape or untie a weight."""
        if self._sites is None or self._patterns != version():
            self._patterns = version()
            with evaluating(self.base):
                self._sites = self.whole_graph(adapted=False).sites
        return self._sites

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the active adapters, in their order."""
        return self.named.active

    def names(self) -> tuple[str, ...]:
        """Return the names of all adapters."""
        return self.named.names()

    def adapter(self, name: str) -> Adapter:
        """Return the adapter of this name, with its tensors.

        Args:
            name: the adapter's name.

        Raises:
            PeftfxError: there is no adapter of this name.
        """
        return self.named[name]

    @property
    def road(self) -> str:
        """The way in which calls run the active adapters: in the base's own `modules`, or in a `graph`."""
        return "graph" if self.obstacle else "modules"

    @property
    def obstacle(self) -> str:
        """The reason why calls do not take the modules road; empty if they do."""
        return GRAPH_ASKED if self.wanted == "graph" else self.modules_road.obstacle(self.named.called)

    def _install(self, name: str, adapter: Adapter) -> None:
        seating = self._seat(adapter)
        self._shared.freeze(self.base)
        self.named.add(name, adapter)
        self.modules_road.enter(name, adapter, seating)

    def exchange(self, name: str, adapter: Adapter) -> None:
        """Put another adapter in the place of the one of this name, as active, and trained, as that one is.

        Args:
            name: the name of the adapter that is replaced.
            adapter: an adapter on the sites of this model.
        """
        seating = self._seat(adapter)
        self.named.exchange(name, adapter)
        self.modules_road.leave(name)
        self.modules_road.enter(name, adapter, seating)
        self.graphs.forget_derived()

    def settle_dropout(self, names: Sequence[str]) -> None:
        """Let adapters act with the rates that other code has set in their dropout modules, as TRL does.

        Args:
            names: the adapters' names.
        """
        for name in names:
            if self.adapter(name).settle_dropout():
                seating = self.modules_road.seatings[name].on(self.adapter(name).placements)
                self.modules_road.leave(name)
                self.modules_road.enter(name, self.adapter(name), seating)
                self.graphs.forget_derived()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the base and of the adapters.

        Args:
            mode: whether to train; otherwise to evaluate.
        """
        super().train(mode)
        self.settle_dropout(self.named.active)
        return self

    def _seat(self, adapter: Adapter) -> Seating:
        """Return where an adapter acts in the base's modules.

        Raises:
            PeftfxError: no module can host the adapter, and the modules road was asked for.
        """
        refuse_wrapped(self.base, adapter)
        if self.wanted == "graph":
            return Seating(obstacle=self.obstacle)
        with evaluating(self.base):
            seating = seat(self.whole_graph(adapted=False), adapter, self._twin.obstacles)
        if late := may_run_late(self.source, adapter, self.sites):
            seating = Seating(obstacle=late)
        if self.wanted == "modules":
            seating = replace(seating, dearer="")
        if seating.obstacle and self.wanted == "modules":
            what = f"no module of the base can run this adapter: {seating.obstacle}"
            other = 'leave road out, or pass road="graph": calls then run a graph'
            alone = "name the modules of the adapter (target_modules): no graph can run this model"
            raise PeftfxError(what, "road", other if isinstance(self.whole, str) else alone)
        if seating.obstacle and self._twin.obstacles:
            warn(f"calls run a graph over dequantised weights, and not the base's own layers: {seating.obstacle}")
        return seating

    def shares_with(self, model: nn.Module) -> None:
        """Refuse merges into the base as long as another library's model uses the same tensors."""
        self._shared.lenders.add(model)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Put the base's original weights back until the `with` block ends, if `merge_adapter` changed them."""
        if self.ledger is None:
            yield
            return
        self.ledger.swap()
        try:
            yield
        finally:
            self.ledger.swap()

    def base_changed(self) -> None:
        """Drop everything that was made from the base, because its weights have changed."""
        self.graphs.forget()
        self._renew()
        self._sites = None

    def _renew(self) -> None:
        """Make a new twin, because the base has new tensors."""
        self._twin.plain.restore()
        self._twin = Twin(self.base)
        self.graphs.base = self.source


def refuse_other_road(wanted: str | None) -> None:
    """Refuse a road that does not exist. None stands for the one that can host all that acts."""
    if wanted not in (None, *ROADS):
        raise PeftfxError(f"unknown road {wanted!r}", "road", "one of 'modules', 'graph'")
