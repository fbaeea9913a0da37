"""AdaptedModel: a base module, the adapters on it, and the graphs derived from them, each made when first needed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.adapters.adapter import Adapter
from peftfx.bases.guests import own_class
from peftfx.export_options.checked import takes
from peftfx.export_options.export import ExportChanges, ExportOptions
from peftfx.generation.invocation import Invocations, under_invocations
from peftfx.graph.graph import BASE, Graph
from peftfx.model.calls import AdapterCalls
from peftfx.model.processes.gathered import gathering, whole_base
from peftfx.passes.base import Pass
from peftfx.sharding import is_sharded, on_first
from peftfx.sites.sites import Sites
from peftfx.twins.twin import Twin
from peftfx.views.arguments import named_arguments
from peftfx.views.decode import Decode
from peftfx.views.entry import Entry
from peftfx.views.prompt_in_view import prompt_in_view
from peftfx.views.view import View

if TYPE_CHECKING:
    from peftfx.export.report import Report
    from peftfx.pages.page import Page

_T = TypeVar("_T")


class AdaptedModel(AdapterCalls):
    """What `peftfx.transform` returns. Called as the base is, with the same arguments and the same output.

    It holds the base (shared, frozen) and the adapters' parameters. A call runs the base's own modules with the
    methods inside them, or a graph, made when it is first needed, where no module can host what acts: `road` says
    which. Weights are never edited to switch an adapter or a mode. `state_dict` is that of the adapters alone:
    whatever saves a module (`Trainer` too) saves them.

    In eval mode a call takes `adapter_names`, as in HF PEFT: the name of the adapter of each row of the batch,
    `"__base__"` for none.
    """

    @classmethod
    def on(
        cls,
        base: nn.Module,
        sites: Sites,
        example: Mapping[str, object],
        road: str | None = None,
        twin: Twin | None = None,
    ) -> AdaptedModel:
        """A model without adapters yet, whose `forward` has the base's signature: `Trainer` reads it."""
        return _subclass(own_class(base))(base, sites, example, road, twin)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        active = ", ".join(self.active) or "none"
        told = "; ".join(f"{name}: {self.adapter(name)!r}" for name in self.names()) or "no adapters"
        return f"{type(self).__name__}({told}; active: {active}; road: {self.road})"

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
        passes: Sequence[Pass] = (),
        **changes: Unpack[ExportChanges],
    ) -> Report:
        """Write an ONNX model to a new directory and verify it: `peftfx.export_onnx` of this model.

        A model that generates text is exported in its decode view, with the key/value cache in and out;
        `view="forward"` exports its forward.

        Args:
            directory: where to; it appears when it is complete and verified.
            options: see `peftfx.ExportOptions`. They can be given by name as well, as in `merge=False`.
            inputs, source, assets, progress, written, passes: see `peftfx.export_onnx`.
            changes: options by name; they come before those in `options`.

        Raises:
            PeftfxError: an option makes no sense, the model cannot be captured or translated, or the directory cannot
                be written.
            VerificationError: ONNX Runtime and torch disagree; nothing is left.
        """
        from peftfx.export.onnx_directory import export_onnx

        asked = ExportOptions.of(options, changes)
        self.named.apart("the model is exported")

        def write(whole: AdaptedModel) -> Report:
            return export_onnx(
                *(whole, directory, asked),
                inputs=inputs,
                source=source,
                assets=assets,
                progress=progress,
                written=written,
                passes=passes,
            )

        return self.gathered("export", write) if is_sharded(self) else write(self)

    def gathered(self, what: str, work: Callable[[AdaptedModel], _T]) -> _T:
        """What a function makes, in the first process, of a model of which each process has a part, gathered there.

        Its weights are gathered one at a time, into memory-mapped files. The other processes wait, and get the same.

        Args:
            what: the name of what every process calls.
            work: called in the first process, with the whole model.

        Raises:
            PeftfxError: another process does not call it.
        """
        gathering(self, what)
        adapters = {name: self.adapter(name).gathered() for name in self.names()}
        with whole_base(self.base) as base:
            return on_first(lambda: work(self._over(base, adapters)))  # type: ignore[arg-type]

    def floating(self) -> AdaptedModel:
        """The same adapters over a base in floating point: itself, or, of a quantised base, over what that stands for.

        Of that base each weight is dequantised when it is read, to float32.
        """
        if self.source is self.base:
            return self
        flags = [(p, p.requires_grad) for p in self.adapters.parameters()]
        made = self._over(self._twin.floating(), {name: self.adapter(name) for name in self.names()})
        for p, flag in flags:
            p.requires_grad_(flag)
        return made

    def _over(self, base: nn.Module, adapters: Mapping[str, Adapter]) -> AdaptedModel:
        """The same adapters over another base of the same parts."""
        made = AdaptedModel.on(base, self.sites, self.example, self.wanted)
        for name, adapter in adapters.items():
            made._install(name, adapter)
        made.set_adapter(self.active)
        return made

    def show(self) -> Page:
        """The model as a page: its layers, and what each adapter does where; in a notebook, it is shown.

        `adapted.show().save("page.html")` writes it. Equal layers are drawn once; a site that is clicked tells more.
        """
        from peftfx.pictures.adapted import show

        return show(self.base, self.sites, {name: self.adapter(name) for name in self.names()})

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()

    def print_readable(self) -> str:
        """Print the adapted graph as Python code; returns the text."""
        return str(self.graph().module.print_readable())

    def graph(  # type: ignore[override]
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
        if not adapted:
            self.named.apart("the base's own graph is asked for")
        self.graphs.base = self.source
        shown = self.view(view) if isinstance(view, str) else view
        entry = self.entry() if adapted else None
        if shown is not None:
            shown, entry = self.under_prompt(shown) if adapted else (shown, None)
            inputs = shown.inputs(self.source) if inputs is None else inputs
        else:
            inputs = self.example if inputs is None else named_arguments(self.base, (), inputs)
        return self.graphs.adapted(inputs, entry, shown, self.named.called if adapted else (), exact=exact)

    def graph_of_call(self, named: Mapping[str, object]) -> Graph:
        return self.graph(named, exact=True)

    def under_prompt(self, view: View) -> tuple[View, Entry | None]:
        """A view of the base as it is under an active soft prompt, and the way into it."""
        entry = self.entry()
        if isinstance(view, Decode):
            view = under_invocations(view, self.invocations)
        return (view, None) if entry is None else prompt_in_view(view, entry)

    @property
    def invocations(self) -> Invocations:
        """The tokens behind which active adapters act, that act so."""
        rules = (rule for adapter in self.named.acting() for rule in adapter.rules)
        return tuple(dict.fromkeys(rule.invoked_by for rule in rules if rule.invoked_by))

    def entry(self) -> Entry | None:
        """The way into the base that an active soft prompt takes; None is the base's own forward."""
        prompts = (p for adapter in self.named.acting() for p in adapter.placements.prompts)
        return next((p.method.entry(self.base, p.site) for p in prompts), None)

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

        return generator(self.source, self.view, lambda view, inputs: self.graph(inputs, view=view)).generate(
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
        self.named.apart("the model is moved or cast")
        self.graphs.forget()
        self.example = pytree.tree_map_only(Tensor, lambda t: t.to(fn(t).dtype), self.example)  # type: ignore[operator]
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        self._renew()
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _blank, (own_class(self.base),), self.__getstate__()


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
