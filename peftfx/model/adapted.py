"""AdaptedModel: a base module, the adapters on it, and the graphs derived from them, each made when first needed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.adapter_set import AdapterSet
from peftfx.adapters.in_place_merge import MergeReport, merge_into, refuse_unmergeable
from peftfx.adapters.state import refuse_other_state
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.export_options.checked import takes
from peftfx.export_options.export import ExportChanges, ExportOptions
from peftfx.graph.contexts import TRACING, evaluating, fake_mode_of
from peftfx.graph.graph import ADAPTERS, BASE, Graph
from peftfx.model.graph_cache import Graphs
from peftfx.model.shared_base import shared
from peftfx.passes.adaptation.merge import Merge
from peftfx.rules.peft_configs import records_of
from peftfx.rules.resolution import as_items, place
from peftfx.sites.sites import Sites
from peftfx.views.arguments import named_arguments
from peftfx.views.entry import Entry
from peftfx.views.prompt_in_view import prompt_in_view
from peftfx.views.view import View

if TYPE_CHECKING:
    from peftfx.export.report import Report

LOSS = "loss"  #: the output that methods add their penalties to
Rules = object
"""What `transform` takes as rules: a Method, a text, a `peft` config object, or a sequence of them."""


class AdaptedModel(nn.Module):
    """What `peftfx.transform` returns. Called as the base is, with the same arguments and the same output.

    It holds the base (shared, frozen), the adapters' parameters, and a cache of graphs by the call's signature, mode
    and active adapters. Weights are never edited to switch an adapter or a mode: another graph is picked or
    derived. `state_dict` is that of the adapters alone: whatever saves a module (`Trainer` too) saves them.
    """

    @classmethod
    def on(cls, base: nn.Module, sites: Sites, example: Mapping[str, object]) -> AdaptedModel:
        """A model without adapters yet, whose `forward` has the base's signature: `Trainer` reads it."""
        return _subclass(type(base))(base, sites, example)  # type: ignore[arg-type]

    def __init__(self, base: nn.Module, sites: Sites, example: Mapping[str, object]) -> None:
        super().__init__()
        self.base, self.example = base, dict(example)
        self.adapters = nn.Module()
        self._sites: Sites | None = sites
        self.named = AdapterSet(self.adapters)
        self.graphs = Graphs(base, self.named)
        self._shared = shared(base, self)
        self.training = base.training

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
        adapter = Adapter(place(self.base, self.sites, rules), records_of(as_items(rules)))
        adapter.ran = self.sites.called.union(site.path for site in self.sites)
        device = next((p.device for p in self.base.parameters()), torch.device("cpu"))
        rng = None if seed is None else torch.Generator(device).manual_seed(seed)
        with fake_mode_of(self.base):
            adapter.create(self.base, rng)
        self._install(name, adapter)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that stands for others, each times its weight, and make it the active one. As in HF PEFT.

        Args:
            adapters, weights: names of adapters of one method, and their weights; these may be negative.
            adapter_name: the new one's.
            combination_type: for LoRA, `cat` sums the effects exactly, at the sum of the ranks, and `linear` sums A
                and B, each times the root of its weight, which is an approximation; IA3 has `linear` alone.
        """
        from peftfx.adapters.combination import combine, tell_left_out

        self.named.refuse(adapter_name)
        named = {name: self.adapter(name) for name in adapters}
        with fake_mode_of(self.base):
            combined = combine(self.base, named, weights, combination_type)
        tell_left_out(named)
        combined.named = frozenset().union(*(adapter.named for adapter in named.values()))
        self._install(adapter_name, combined)

    def _install(self, name: str, adapter: Adapter) -> None:
        self._shared.freeze(self.base)
        self.named.add(name, adapter)

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Add an adapter from a HF PEFT directory, and make it the active one.

        Raises:
            PeftfxError: it is not for this base, or the base has no values: fake tensors, or such on the meta device.
        """
        from peftfx.adapters.files.reader import read_adapter

        self.named.refuse(name)
        self._install(name, read_adapter(Path(path), self.base, self.sites))

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
        """Give out the rank budgets of the active adapters anew; see `peftfx.adapters.rank_allocation`.

        Call it in each step of training, after `optimizer.step()` and before gradients are zeroed. Steps count from 0.
        """
        from peftfx.adapters.rank_allocation import allocate

        allocate(self.named.acting(), global_step)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the base. In other threads it is not."""
        return self.named.acting_as()

    def remove(self, name: str | None = None) -> nn.Module:
        """Remove an adapter, or all of them; returns the base, which is as it was before when all are gone.

        It trains what it trained before when no other adapted model has adapters on it either.
        """
        for gone in self.names() if name is None else (name,):
            self.named.drop(gone)
        self.graphs.forget_derived()
        if not self.names():
            self._shared.thaw(self.base)
        return self.base

    def merge(self) -> MergeReport:
        """Fold the active adapters into the base's own weights, in place, one site at a time, and remove them.

        Weights shared with a module that is not adapted (a tied head, say) are untied first. `remove()` then gives the
        merged module. Nothing is changed if an active adapter cannot be merged, or another adapted model over the
        same base has adapters.
        """
        self._shared.refuse_others(self)
        refuse_unmergeable({name: self.adapter(name) for name in self.active})
        with evaluating(self.base):
            merged = Merge()(self.graph()).graph
        report = merge_into(self.base, merged, self.named.acting())
        for name in self.active:
            self.remove(name)
        self._shared.changed()
        return report

    def base_changed(self) -> None:
        """Drop what was made from the base: its weights are others now, here or under another adapted model."""
        self.graphs.forget()
        self._sites = None

    @takes(ExportOptions)
    def export(
        self,
        directory: str | Path,
        options: ExportOptions | None = None,
        *,
        inputs: Mapping[str, object] | None = None,
        source: str | Path = "",
        assets: Callable[[Path], object] | None = None,
        progress: Callable[[str], object] | None = None,
        written: Callable[[int, int], object] | None = None,
        **changes: Unpack[ExportChanges],
    ) -> Report:
        """Write an ONNX model to a new directory and verify it; the arguments are those of `peftfx.export_onnx`.

        A model that generates text is exported in its decode view, with the key/value cache in and out;
        `view="forward"` exports its forward.
        """
        from peftfx.export.onnx_directory import export_onnx

        asked = ExportOptions.of(options, changes)
        return export_onnx(
            *(self, directory, asked), inputs=inputs, source=source, assets=assets, progress=progress, written=written
        )

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
        if is_main_process:
            save_adapters(self.base, adapters, Path(directory))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all; a trained bias stands for the base's own, as in HF PEFT."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        own = {o.key: self.adapter(n).get(o.key) for n in self.names() for o in self.adapter(n).overrides if o.stands}
        return trained, sum(p.numel() for p in self.parameters()) - sum(t.numel() for t in own.values())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in HF PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def print_readable(self) -> str:
        """Print the adapted graph as Python code; returns the text."""
        return str(self.graph().module.print_readable())

    def gradient_checkpointing_enable(self, **_: object) -> None:
        """Refused: a captured graph keeps its activations."""
        raise PeftfxError("gradient checkpointing does not reach a captured graph", "", "train with a smaller batch")

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapters' tensors, as `adapters.<name>.<path>.<parameter>`; the base's are not the adapter's to save."""
        prefix = f"{kwargs.get('prefix', '')}{BASE}."
        own: dict[str, Tensor] = super().state_dict(*args, **kwargs)  # type: ignore[call-overload]
        for key in [k for k in own if k.startswith(prefix)]:
            del own[key]
        return own

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """Load what `state_dict` gave. With `strict`, every key must fit and none may be missing."""
        own: dict[str, Tensor] = super().state_dict()
        refuse_other_state(own, state_dict, {name: self.adapter(name) for name in self.names()}, strict)
        for name in self.names():
            start = f"{ADAPTERS}.{name}."
            self.adapter(name).recall({k.removeprefix(start): t for k, t in state_dict.items() if k.startswith(start)})
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys[:] = [k for k in result.missing_keys if k.startswith(f"{ADAPTERS}.")]
        return result

    def graph(
        self,
        inputs: Mapping[str, object] | None = None,
        *,
        adapted: bool = True,
        view: str | View = "forward",
        exact: bool = False,
    ) -> Graph:
        """The graph for a call with these keyword arguments (or with example inputs), in the current mode.

        Args:
            inputs: as for a call; values do not matter, sizes only where the model fixes them or branches on them:
                the graph's `conditions` say for which it holds.
            adapted: with the active adapters; otherwise the base's own graph.
            view: `forward`, or another view of the model: `decode` has the key/value cache in and out.
            exact: where a size is 1 and the model's code has a branch for that, the graph of this branch, as a call
                takes it; otherwise one of many sizes.
        """
        shown = self.view(view) if isinstance(view, str) else view
        entry = self.entry() if adapted else None
        if shown is not None:
            shown, entry = self.under_prompt(shown) if adapted else (shown, None)
            inputs = shown.inputs(self.base) if inputs is None else inputs
        else:
            inputs = self.example if inputs is None else named_arguments(self.base, (), inputs)
        return self.graphs.adapted(inputs, entry, shown, self.active if adapted else (), exact=exact)

    def under_prompt(self, view: View) -> tuple[View, Entry | None]:
        """A view of the base as it is under an active soft prompt, and the way into it."""
        entry = self.entry()
        return (view, None) if entry is None else prompt_in_view(view, entry)

    def entry(self) -> Entry | None:
        """The way into the base that an active soft prompt takes; None is the base's own forward."""
        placements = (p for adapter in self.named.acting() for p in adapter.placements)
        entries = (p.method.entry(self.base, p.site) for p in placements if isinstance(p.method, SequenceMethod))
        return next(entries, None)

    def view(self, name: str) -> View | None:
        """The view of this name, as it is under an active soft prompt; `None` for the forward."""
        found = self.graphs.view(name)
        return None if found is None else self.under_prompt(found)[0]

    def generate(self, *args: object, **kwargs: object) -> object:
        """Generate tokens with the active adapters: transformers' own `generate`, over the graph of the decode view.

        Arguments and result are those of the base's `generate`.

        Raises:
            PeftfxError: the model generates nothing, or is asked for what a graph cannot give.
        """
        from peftfx.model.generation import generator

        return generator(self.base, self.view, lambda view, inputs: self.graph(inputs, view=view)).generate(
            *args, **kwargs
        )

    def __getattr__(self, name: str) -> object:  # type: ignore[override]
        """Attributes of the base (`config`, `device`, ...); not its methods, which know nothing of adapters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__(BASE), name)
            if inspect.ismethod(value):
                raise AttributeError(f"{name}() of the base would run without the adapters") from None
            return value

    def _apply(self, fn: object, recurse: bool = True) -> AdaptedModel:
        """Moved or cast: graphs made for the old device and dtype are dropped, and examples follow the dtype."""
        self.graphs.forget()
        self.example = pytree.tree_map_only(Tensor, lambda t: t.to(fn(t).dtype), self.example)  # type: ignore[operator]
        return super()._apply(fn, recurse)  # type: ignore[arg-type, return-value]

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave the graphs behind: they are made again, over the copy's own tensors."""
        own = {key: value for key, value in self.__dict__.items() if key not in ("graphs", "_shared")}
        return {**own, "_trained": dict(self._shared.trained)}

    def __setstate__(self, state: dict[str, object]) -> None:
        trained = state.pop("_trained")
        super().__setstate__(state)
        self.graphs = Graphs(self.base, self.named)
        self._shared = shared(self.base, self, trained)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[object, ...]:
        return _blank, (type(self.base),), self.__getstate__()

    def _call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        graph, tensors = self._find(args, kwargs)
        flat = graph.run(*tensors)
        if LOSS in graph.outputs:
            for penalty in (adapter.penalty() for adapter in self.named.acting()):
                at = graph.outputs.index(LOSS)
                flat[at] = flat[at] if penalty is None else flat[at] + penalty
        return pytree.tree_unflatten(flat, graph.out_spec)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[Graph, list[Tensor]]:
        """The graph to run for a call, and its inputs; torch.compile sees what is found and not how."""
        named = named_arguments(self.base, args, kwargs)
        leaves, _ = pytree.tree_flatten_with_path(named)
        with TRACING:  # a graph that another thread is making may be the one
            graph = self.graphs.swept(self.graph(named, exact=True))
        return graph, [v for _, v in leaves if isinstance(v, Tensor)]


@functools.cache
def _subclass(base_class: type[nn.Module]) -> type[AdaptedModel]:
    def forward(self: AdaptedModel, *args: object, **kwargs: object) -> object:
        return self._call(args, kwargs)

    forward.__signature__ = inspect.signature(base_class.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "__doc__": AdaptedModel.__doc__, "__module__": __name__}
    # `Trainer` finds a model's labels by the signature of its class and by "QuestionAnswering" in the class's name.
    return type(f"Adapted{base_class.__name__}", (AdaptedModel,), members)


def _blank(base_class: type[nn.Module]) -> AdaptedModel:
    """An AdaptedModel without state yet, for `copy` and `pickle`: its class has no name they could look up."""
    cls = _subclass(base_class)  # type: ignore[arg-type]
    return cls.__new__(cls)
