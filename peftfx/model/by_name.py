"""AdaptersByName: the adapters over a base, by name: added, loaded, made active, merged, removed, saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.adapter_set import AdapterSet
from peftfx.adapters.adjustment import adjust
from peftfx.adapters.base_writer import Ledger
from peftfx.adapters.state import refuse_other_state
from peftfx.errors import PeftfxError, warn
from peftfx.graph.contexts import evaluating, fake_mode_of
from peftfx.graph.graph import ADAPTERS, BASE, Graph
from peftfx.hosting.road import ModulesRoad
from peftfx.hosting.seating import seat
from peftfx.hosting.seats import Seating
from peftfx.model.gathered import gathering
from peftfx.model.graph_cache import Graphs
from peftfx.model.late_modules import may_run_late
from peftfx.model.shared_base import shared
from peftfx.rules.peft_configs import records_of
from peftfx.rules.resolution import as_items, place
from peftfx.sharding import rank
from peftfx.sites.sites import Sites
from peftfx.twins.twin import Twin

Rules = object
"""What `transform` takes as rules: a Method, a text, a `peft` config object, or a sequence of them."""
ROADS = ("modules", "graph")


class AdaptersByName(nn.Module):
    """A base, shared and frozen, and the adapters on it.

    Args:
        base: the model.
        sites: where adapters can act.
        example: a call of the base, by the names of its arguments.
        wanted: the road that calls take, `modules` or `graph`; None is the modules where they can host all that acts.
        twin: of the base, if there is one already.
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
        if wanted not in (None, *ROADS):
            raise PeftfxError(f"unknown road {wanted!r}", "road", "one of 'modules', 'graph'")
        self.adapters = nn.Module()  # ahead of the base, which has what they hold again: by these names it is known
        self.base, self.example, self.wanted = base, dict(example), wanted
        self._sites: Sites | None = sites
        self.named = AdapterSet(self.adapters)
        self._twin = Twin(base) if twin is None else twin
        self.graphs = Graphs(self.source, self.named)
        self.modules_road = ModulesRoad(base, self.named)
        self._shared = shared(base, self)
        self.ledger: Ledger | None = None
        self.training = base.training

    @abstractmethod
    def graph(self, *, adapted: bool = True) -> Graph:
        """The graph of an example call."""

    @property
    def source(self) -> nn.Module:
        """The base as its weights are read: itself, or its twin, where some are quantised (`peftfx.twins.twin`)."""
        return self._twin.module

    @property
    def sites(self) -> Sites:
        """The adaptable places of the base as it is now; a merge can change a shape, or untie a weight."""
        if self._sites is None:
            with evaluating(self.base):
                self._sites = self.graph(adapted=False).sites
        return self._sites

    def add_adapter(self, name: str, rules: Rules, *, seed: int | None = None) -> None:
        """Add an adapter and make it the active one. Two adapters may act at one site; their effects add up in order.

        Args:
            name: any valid name of a directory, without dots; not the name of another adapter.
            rules: see `transform`.
            seed: of the random initial values; by default they come from torch's global generator.
        """
        self.named.refuse(name)
        self.named.apart("an adapter is added")
        adapter = Adapter(place(self.source, self.sites, rules), records_of(as_items(rules)))
        adapter.ran = self.sites.called.union(site.path for site in self.sites)
        self._start(adapter, seed)
        self._install(name, adapter)

    def reset_parameters(self, adapter_name: str | None = None, *, seed: int | None = None) -> None:
        """Give an adapter, or all, initial values anew; where it was added to a base on the meta device, its first.

        Args:
            adapter_name: by default all.
            seed: see `add_adapter`.
        """
        self.base_changed()
        for name in self.names() if adapter_name is None else (adapter_name,):
            self._start(self.adapter(name), seed)
        self.set_adapter(self.active)

    def _start(self, adapter: Adapter, seed: int | None) -> None:
        device = next((p.device for p in self.source.parameters()), torch.device("cpu"))
        rng = None if seed is None or device.type == "meta" else torch.Generator(device).manual_seed(seed)
        with fake_mode_of(self.base):
            adapter.create(self.source, rng)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that stands for others, each times its weight, and make it the active one. As in HF PEFT.

        Args:
            adapters, weights: names of adapters of one method, and their weights; these may be negative.
            adapter_name: the new one's.
            combination_type: for LoRA, `cat` sums the effects exactly, at the sum of the ranks; `svd` sums them and
                cuts the sum to a rank; `linear` sums A and B, each times the root of its weight, which is an
                approximation. `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` prune A and B ahead of that,
                and with `_svd` behind them the effects. IA3 has `linear` alone.
            svd_rank, svd_clamp, density, majority_sign_method: see `peftfx.contract.combination.Combination`.
        """
        from peftfx.adapters.combination import combine, tell_left_out
        from peftfx.contract.combination import Combination

        self.named.refuse(adapter_name)
        self.named.apart("an adapter is added")
        named = {name: self.adapter(name) for name in adapters}
        with fake_mode_of(self.base):
            how = Combination(
                combination_type=combination_type,
                svd_rank=svd_rank,
                svd_clamp=svd_clamp,
                density=density,
                majority_sign_method=majority_sign_method,
            )
            combined = combine(self.source, named, weights, how)
        tell_left_out(named)
        combined.named = frozenset().union(*(adapter.named for adapter in named.values()))
        self._install(adapter_name, combined)

    def convert_to_lora(self, adapter_name: str, rank: float, new_name: str = "lora") -> None:
        """Add a LoRA that does what another adapter does to weights, and make it the active one.

        Args:
            adapter_name: an adapter of any method that acts on weights.
            rank: a whole number is the rank; a number of 0 to 1 the share of each update's energy that is kept.
            new_name: the LoRA's.
        """
        from peftfx.adapters.lora_conversion import lora_of, updates_of

        self.named.refuse(new_name)
        adapter = self.adapter(adapter_name)
        made = lora_of(updates_of(self.source, adapter), rank, adapter.records)
        made.named = adapter.named
        self._install(new_name, made)

    def _install(self, name: str, adapter: Adapter) -> None:
        seating = self._seat(adapter)
        self._shared.freeze(self.base)
        self.named.add(name, adapter)
        self.modules_road.enter(name, adapter, seating)

    def _seat(self, adapter: Adapter) -> Seating:
        """Where an adapter acts in the base's modules.

        Raises:
            PeftfxError: no module can host it, and that road was asked for.
        """
        if self.wanted == "graph":
            return Seating(obstacle=self.obstacle)
        with evaluating(self.base):
            seating = seat(self.graph(adapted=False), adapter, self._twin.obstacles)
        if late := may_run_late(self.source, adapter, self.sites):
            seating = Seating(obstacle=late)
        if seating.obstacle and self.wanted == "modules":
            what = f"no module of the base can host this adapter: {seating.obstacle}"
            raise PeftfxError(what, "road", 'leave road out, or pass road="graph": calls then run a graph')
        if seating.obstacle and self._twin.obstacles:
            warn(f"calls run a graph over dequantised weights, and not the base's own layers: {seating.obstacle}")
        return seating

    @property
    def road(self) -> str:
        """How calls are run under the active adapters: by the base's own `modules`, or by a `graph`."""
        return "graph" if self.obstacle else "modules"

    @property
    def obstacle(self) -> str:
        """Why calls do not take the modules road; empty where they do."""
        return 'road="graph" was asked for' if self.wanted == "graph" else self.modules_road.obstacle(self.named.called)

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Add an adapter from a HF PEFT directory, and make it the active one.

        Raises:
            PeftfxError: it is not for this base, or the base has no values: fake tensors, or such on the meta device.
        """
        from peftfx.adapters.files.reader import read_adapter

        self.named.refuse(name)
        self.named.apart("an adapter is added")
        self._install(name, read_adapter(Path(path), self.source, self.sites))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters that act."""
        return self.named.active

    def names(self) -> tuple[str, ...]:
        """The names of all adapters."""
        return self.named.names()

    def adapter(self, name: str) -> Adapter:
        """One adapter's state."""
        return self.named[name]

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make these adapters the active ones, in this order; only they are trained. In every thread."""
        given = (names,) if isinstance(names, str) or not isinstance(names, Sequence | Set) else tuple(names)
        self.named.activate(given)

    def update_and_allocate(self, global_step: int) -> None:
        """Give out the rank budgets of the active adapters anew; see `peftfx.contract.common.rank_allocation`.

        Call it in each step of training, after `optimizer.step()` and before gradients are zeroed. Steps count from 0.
        """
        adjust(self.named.acting(), global_step)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the base. In other threads it is not."""
        return self.named.acting_as()

    def remove(self, name: str | None = None) -> nn.Module:
        """Remove an adapter, or all of them; returns the base, which is as it was before when all are gone.

        It trains what it trained before when no other adapted model has adapters on it either.
        """
        self.named.apart("an adapter is removed")
        for gone in self.names() if name is None else (name,):
            self.named.drop(gone)
            self.modules_road.leave(gone)
        self.graphs.forget_derived()
        if not self.names():
            self._shared.thaw(self.base)
        return self.base

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the base's weights are without what `merge_adapter` put there."""
        if self.ledger is None:
            yield
            return
        self.ledger.swap()
        try:
            yield
        finally:
            self.ledger.swap()

    def base_changed(self) -> None:
        """Drop what was made from the base: its weights are others now, here or under another adapted model."""
        self.graphs.forget()
        self._renew()
        self._sites = None

    def _renew(self) -> None:
        """The base has other tensors now."""
        self._twin = Twin(self.base)
        self.graphs.base = self.source

    def save_pretrained(
        self,
        directory: str | Path,
        adapter_name: str | None = None,
        *,
        selected_adapters: Sequence[str] | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: str | bool = "auto",
    ) -> None:
        """Write HF PEFT directories: one adapter in `directory`, others in folders of their names below it.

        Args:
            adapter_name: the one to write; by default all.
            selected_adapters: those to write, as in HF PEFT.
            safe_serialization: safetensors; pickles are not written.
            is_main_process: where it is false, nothing is written.
            state_dict, save_embedding_layers: refused; the adapters' own tensors are what is written.

        Raises:
            PeftfxError: there is no such adapter, or an argument asks for what is not written.
        """
        from peftfx.adapters.files.writer import refuse_arguments, save_adapters

        refuse_arguments(safe_serialization, state_dict, save_embedding_layers)
        if adapter_name is not None and selected_adapters is not None:
            raise PeftfxError("both say what to save", "adapter_name, selected_adapters", "give one of them")
        chosen = self.names() if adapter_name is None else (adapter_name,)
        chosen = chosen if selected_adapters is None else tuple(selected_adapters)
        adapters = {name: self.adapter(name) for name in chosen}
        if gathering(self, "save_pretrained"):
            adapters = {name: adapter.gathered() for name, adapter in adapters.items()}
            is_main_process = is_main_process and rank() == 0
        if is_main_process:
            with self.plain():
                save_adapters(self.source, adapters, Path(directory))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all; a trained bias stands for the base's own, as in HF PEFT."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        own = {o.key: self.adapter(n).get(o.key) for n in self.names() for o in self.adapter(n).overrides if o.stands}
        every = {id(p): p.numel() for p in (*self.adapters.parameters(), *self.source.parameters())}
        return trained, sum(every.values()) - sum(t.numel() for t in own.values())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in HF PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapters' tensors, as `adapters.<name>.<path>.<parameter>`; the base's are not the adapter's to save."""
        prefix = f"{kwargs.get('prefix', '')}{BASE}."
        own: dict[str, Tensor] = super().state_dict(*args, **kwargs)  # type: ignore[call-overload]
        for key in [k for k in own if k.startswith(prefix)]:
            del own[key]
        return own

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """Load what `state_dict` gave. With `strict`, every key must fit and none may be missing."""
        self.named.apart("adapters get other values")
        own: dict[str, Tensor] = super().state_dict()
        refuse_other_state(own, state_dict, {name: self.adapter(name) for name in self.names()}, strict)
        for name in self.names():
            start = f"{ADAPTERS}.{name}."
            self.adapter(name).recall({k.removeprefix(start): t for k, t in state_dict.items() if k.startswith(start)})
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys[:] = [k for k in result.missing_keys if k.startswith(f"{ADAPTERS}.")]
        return result

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave the graphs behind: they are made again, over the copy's own tensors."""
        self.named.apart("the model is copied")
        left = ("graphs", "_shared", "modules_road", "_twin")
        own = {key: value for key, value in self.__dict__.items() if key not in left}
        return {**own, "_trained": dict(self._shared.trained), "_seatings": dict(self.modules_road.seatings)}

    def __setstate__(self, state: dict[str, object]) -> None:
        trained, seatings = state.pop("_trained"), state.pop("_seatings")
        super().__setstate__(state)
        self._twin = Twin(self.base)
        self.graphs = Graphs(self.source, self.named)
        self.modules_road = ModulesRoad(self.base, self.named)
        for name, seating in seatings.items():  # type: ignore[attr-defined]
            self.modules_road.enter(name, self.named[name], seating)
        self._shared = shared(self.base, self, trained)  # type: ignore[arg-type]
