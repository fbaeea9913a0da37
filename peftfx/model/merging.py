"""Merging: adapters folded into the base's own weights, for good or until they are unmerged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftfx.adapters.base_writer import Ledger
from peftfx.adapters.in_place_merge import merge_into
from peftfx.adapters.merge_report import MergeReport, refuse_unmergeable
from peftfx.errors import PeftfxError, warn
from peftfx.graph.contexts import evaluating
from peftfx.graph.graph import Graph
from peftfx.model.graphs.graph_cache import Graphs
from peftfx.model.processes.gathered import gathering
from peftfx.model.saved import SavedAdapters
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.adaptation.pattern_weights import refuse_unfolded
from peftfx.sharding.models import is_sharded
from peftfx.sharding.refusals import refuse_zero3


class Merging(SavedAdapters):
    """Adapters by name, with methods that merge them into the base."""

    def merge(self) -> MergeReport:
        """Fold the active adapters into the base's own weights, in place, one site at a time, and remove them.

        Weights that are shared with a module that is not adapted (a tied head, for example) are untied first. After the
        merge `remove()` returns the merged module. Nothing changes if an active adapter cannot be merged, or if another
        adapted model over the same base has adapters.

        Examples:
            >>> report = adapted.merge()
            >>> plain = adapted.remove()
        """
        self.named.apart("adapters are merged for good")
        self._shared.refuse_others(self)
        refuse_zero3(self, "a merge would have nowhere to put the weights", "export it merged: export(merge=True)")
        gathering(self, "merge")
        if self.source is not self.base and self._twin.offloaded:
            what = "weights of the base are offloaded: a merge would have nowhere to put them"
            raise PeftfxError(what, "merge", "export(merge=True) writes merged weights one at a time; or load it whole")
        merged = merged_graph(self)
        seated = {name: self.named[name] for name in self.modules_road.seatings}
        for name in seated:
            self.modules_road.leave(name)
        self._twin.plain.restore()  # the report tells of the scales that are merged
        try:
            report = merge_into(self.base, merged, self.named.acting())
            for name in self.active:
                self.remove(name)
        finally:
            self._shared.changed()
            for name in seated.keys() & set(self.names()):
                self.modules_road.enter(name, seated[name], self._seat(seated[name]))
        return report

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Fold adapters into the base's own weights, remove all adapters, and return the base; see `merge`.

        Args:
            progressbar: ignored.
            safe_merge: ignored, because every merge is safe: nothing is written if a weight would not be finite.
            adapter_names: the names of the adapters to fold; by default the active ones.

        Examples:
            >>> plain = adapted.merge_and_unload()
        """
        before = self.active
        try:
            if adapter_names is not None:
                self.set_adapter(adapter_names)
            self.merge()
        except PeftfxError:
            self.set_adapter(before)
            raise
        return self.remove()

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base's weights until `unmerge_adapter` puts the original tensors back.

        Until then calls run only the base. The original weights are kept beside the merged ones, so the adapted weights
        take twice their memory. Whatever needs the original base (another adapter, `merge`, `export`, a copy) unmerges
        first, with a warning.

        Args:
            adapter_names: the names of the adapters to fold, besides those that are folded already; by default the
                active ones.
            safe_merge: ignored, because every merge is safe: nothing is written if a weight would not be finite.

        Raises:
            PeftfxError: an adapter cannot be folded into weights; the weights are quantised, fetched by hooks or
                sharded; or another adapted model over the same base has adapters. Then nothing is changed.

        Examples:
            >>> adapted.merge_adapter()
            >>> adapted.unmerge_adapter()  # the base's own tensors again
        """
        given = self.active if adapter_names is None else tuple(adapter_names)
        new = [name for name in given if self.adapter(name) and name not in self.named.folded]
        if not new:
            warn("nothing to merge: no adapter is active, or those that are named are merged already")
            return
        names = (*self.named.folded, *new)
        if self.named.folded:
            self.unmerge_adapter()
        self._shared.refuse_others(self)
        if is_sharded(self):
            hint = "merge() folds them for good, and export() writes a merged model"
            raise PeftfxError("each process has a part of this model's weights", "merge_adapter", hint)
        if self.source is not self.base:
            hint = "merge() writes them in floating point for good, and export() writes a merged model"
            raise PeftfxError("weights of this base are quantised, or hooks fetch them", "merge_adapter", hint)
        with self.named.acting_as(names):
            merged, acting = merged_graph(self), self.named.acting()
        seatings = dict(self.modules_road.seatings)
        for name in seatings:
            self.modules_road.leave(name)
        ledger = Ledger()
        graphs, sites = self.graphs, self._sites

        def put_back() -> None:
            ledger.swap()
            self.ledger, self.named.folded, self.named.unfold = None, (), None
            self._shared.changed()
            self.graphs, self._sites = graphs, sites
            for name, seating in seatings.items():
                self.modules_road.enter(name, self.named[name], seating)

        self.graphs = Graphs(self.source, self.named)
        try:
            merge_into(self.base, merged, acting, ledger)
        except BaseException:
            put_back()
            raise
        self._shared.changed()
        self._sites = sites
        self.ledger, self.named.folded, self.named.unfold = ledger, names, put_back
        if left := [name for name in self.named.active if name not in names]:
            warn(f"until unmerge_adapter calls run the merged base alone, without the active {', '.join(left)}")

    def unmerge_adapter(self) -> None:
        """Put the base's original tensors back in place of the weights that `merge_adapter` wrote."""
        if self.named.unfold is None:
            warn("nothing to unmerge: no adapter is merged")
            return
        self.named.unfold()


def merged_graph(adapted: Merging) -> Graph:
    """Return the graph of an example call, with the active adapters folded into its weights.

    Raises:
        PeftfxError: one of the adapters cannot be folded into weights.
    """
    refuse_unmergeable({name: adapted.adapter(name) for name in adapted.active})
    with evaluating(adapted.base):
        graph = adapted.whole_graph()
        refuse_unfolded(graph)
        return Merge()(graph).graph
