"""The reference of an export: the model's own code, with adapters on its modules by their paths.

The reference uses another road than the export: nothing is captured, and no sites are searched. So it reveals what a
capture, the search for sites, or the loading of an adapter lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.adapters.adapter import Adapter
from peftfx.contract.override import SAVED
from peftfx.export.verification.captured import by_name
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.adapters import applied, without_place_for_bias
from peftfx.export.verification.eager.kept_state import equal, state_kept
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.graph.contexts import evaluating
from peftfx.graph.places import above, owns_weight
from peftfx.model.adapted import AdaptedModel
from peftfx.views.arguments import nested
from peftfx.views.cache_prefix import Prefilled
from peftfx.views.decode import Decode
from peftfx.views.entry import Entry, forward
from peftfx.views.view import View, as_captured


@dataclasses.dataclass
class EagerReference:
    """The model's own code under the active adapters, in one view.

    Attributes:
        adapted: the model. The adapters that are active at the time of a call count.
        view: the view in which the model is run; None is its forward.
        example: keyword arguments of the forward, which say where nested inputs belong.
        named: the paths of the modules that the adapters act at.
        seen: the paths of the named modules that have run in some call.
    """

    adapted: AdaptedModel
    view: View | None
    example: Mapping[str, object] = dataclasses.field(default_factory=dict)
    named: set[str] = dataclasses.field(default_factory=set)
    seen: set[str] = dataclasses.field(default_factory=set)
    read_elsewhere: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, feed: Mapping[str, Tensor]) -> Tensors:
        """Run the model on the inputs, and return its outputs by name. The model's state is restored afterwards.

        Raises:
            PeftfxError: the model's own code refuses the inputs; or it keeps state, and computes something else in its
                next call.
        """
        base, adapters = self.adapted.base, self.adapted.named.acting()
        with torch.no_grad(), evaluating(base), as_captured(base), state_kept(base) as kept:
            output = self._run(base, adapters, feed)
            kept.refuse_other(output, lambda: self._run(base, adapters, feed))
            return output

    def _run(self, base: nn.Module, adapters: Sequence[Adapter], feed: Mapping[str, Tensor]) -> Tensors:
        with applied(base, adapters, self.read_elsewhere, feed) as state:
            output = self._call(base, adapters, feed)
        self.named |= state.named
        self.seen |= state.seen
        _refuse_lost(adapters, self.seen - self._spared(base, adapters, feed, output))
        idle = {path for path in state.named - self.seen - self.read_elsewhere if owns_weight(base, path)}
        if idle:  # if code reads the weight of a module that does not run, the code has to read the adapted weight
            self.read_elsewhere |= idle
            with applied(base, adapters, self.read_elsewhere, feed):
                again = self._call(base, adapters, feed)
            if any(not torch.equal(again[name], value) for name, value in output.items()):
                self.seen |= idle
            output = again
        return output

    def _spared(
        self, base: nn.Module, adapters: Sequence[Adapter], feed: Mapping[str, Tensor], output: Tensors
    ) -> set[str]:
        """Return the modules whose adapter tensors were left out, if no output depends on the modules."""
        left = {path for adapter in adapters for path in adapter.unread & self.seen}
        if not left:
            return set()
        with applied(base, adapters, self.read_elsewhere, feed), _stirred(base, left):
            again = self._call(base, adapters, feed)
        return left if all(equal(again.get(name), value) for name, value in output.items()) else set()

    def _call(self, base: nn.Module, adapters: Sequence[Adapter], feed: Mapping[str, Tensor]) -> Tensors:
        entry, hole = _prompt(self.adapted, adapters)
        if self.view is not None:
            view, entry = (self.view, None) if entry is None else self.adapted.under_prompt(self.view)
            if entry is None:
                output = view(base, feed)
            else:
                if isinstance(entry, Prefilled):
                    assert hole is not None
                    assert isinstance(view, Decode)
                    hole = _prefilled(base, view, entry, hole)
                assert hole is not None
                output = entry(view, base, hole, feed)  # type: ignore[assignment]
            return {name: value for name, value in output.items() if isinstance(value, Tensor)}
        call = nested(feed, self.example)
        result = base(**call) if entry is None or hole is None else entry(forward, base, hole, call)
        return by_name(result)


@contextlib.contextmanager
def _stirred(base: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Change the outputs of the modules at these paths while this context lasts."""

    def stir(module: nn.Module, args: object, output: object) -> object:
        return pytree.tree_map_only(Tensor, lambda t: t + 1 if t.is_floating_point() else t, output)

    handles = [base.get_submodule(path).register_forward_hook(stir) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_lost(adapters: Sequence[Adapter], seen: set[str]) -> None:
    """Refuse an adapter whose file names a module that runs, if no rule of the adapter acts there."""
    for adapter in adapters:
        acts = [p.key for p in adapter.placements] + [p.site.path for p in adapter.placements]
        acts += [o.key.removeprefix(f"{SAVED}.") for own in adapter.overrides for o in own.by_each_name()]
        acting = {*acts, *(path for at in acts for path in above(at) if path)}
        repeats = [name for account in adapter.accounts.values() for name in account.repeats]  # of a tied head, say
        lost = sorted(
            path
            for path in adapter.named & seen
            if path not in acting and not any(f".{path}." in f".{n}" for n in repeats)
        )
        if lost:
            what = f"the file has tensors for {len(lost)} modules that run, but the reference adapts none of them"
            raise VerificationError(what, ", ".join(lost[:3]), "report this model, or leave these modules out")


def _prompt(adapted: AdaptedModel, adapters: Sequence[Adapter]) -> tuple[Entry | None, Tensor | None]:
    """Return the entry of the active soft prompt into the base's forward, and the prompt's tensor; or None twice."""
    for adapter in adapters:
        for placement in adapter.placements.prompts:
            virtual = placement.method.virtual(adapter.params(placement), False)
            entry = adapted.entry()
            assert entry is not None
            return entry, virtual.to(entry.dtype)
    return None, None


def _prefilled(base: nn.Module, view: Decode, entry: Prefilled, hole: Tensor) -> Tensor:
    """Run a causal model on virtual tokens, and return what they leave in the cache, a row for each token."""
    assert entry.tokens is not None
    made = view.inputs(base, sizes={"batch": 1, "sequence": 1, "past": 0})
    output = entry.tokens(view, base, hole, made)
    assert isinstance(output, dict)
    kept = [output[name][:, :, : len(hole)] for name in view.present_names]
    return torch.cat([rows[0].transpose(0, 1).flatten(1) for rows in kept], 1)


def no_oracle(adapted: AdaptedModel) -> str:
    """Say why the active adapters have no eager form. Return an empty string if they have one."""
    acting = [adapter.placements for adapter in adapted.named.acting()]
    for beside in (p.method for placements in acting for p in placements.attentions):
        return f"{type(beside).__name__} acts inside attentions, where no hook reaches"
    for match in (p.method for placements in acting for p in placements.patterns):
        return f"{type(match).__name__} acts at a pattern, which is found in a graph alone"
    if path := without_place_for_bias(adapted.source, adapted.named.acting()):
        return f"it adds a bias at {path}, whose own code reads none"
    return ""
