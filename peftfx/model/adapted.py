"""The class `AdaptedModel`: a base, its adapters, and the graphs derived from both, each made when first needed."""

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
from peftfx.hosting.base_methods import COUNTS, base_method
from peftfx.model.calls import AdapterCalls
from peftfx.model.own_generation import refuse_names
from peftfx.model.processes.gathered import gathering, whole_base
from peftfx.model.trainers.tuner_of_peft import refuse_layers_of_peft
from peftfx.passes.base import Pass
from peftfx.sharding.models import is_sharded
from peftfx.sharding.processes import on_first
from peftfx.sites.sites import Sites
from peftfx.twins.twin import Twin
from peftfx.views.arguments import named_arguments
from peftfx.views.decode import Decode
from peftfx.views.entry import Entry
from peftfx.views.prompt_in_view import prompt_in_view
from peftfx.views.view import View

if TYPE_CHECKING:
    from peftfx.export.reports.report import Report
    from peftfx.pages.page import Page

_T = TypeVar("_T")


class AdaptedModel(AdapterCalls):
    """The result of `peftfx.transform`: a model that is called as the base is, with the same arguments and outputs.

    The model holds the base (shared, frozen) and the adapters' parameters. A call runs the base's own modules with the
    methods inside them. If no module can host an adapter, the call runs a graph instead, which is made when it is
    first needed; `road` says which of the two. Weights are never edited to switch an adapter or a mode. `state_dict`
    has only the adapters' tensors: whatever saves a module (`Trainer`, for example) saves only these.

    In eval mode a call takes `adapter_names`, as in HF PEFT: for each row of the batch the name of its adapter, or
    `"__base__"` for none.

    Examples:
        >>> adapted = peftfx.transform(model, "lora(r=8)@attention")
        >>> adapted(input_ids=torch.tensor([[3, 5, 8]])).logits.shape
        torch.Size([1, 3, 64])
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
        """Return a model without adapters, whose `forward` has the base's signature, because `Trainer` reads that."""
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

        A model that generates text is exported in its decode view, with the key/value cache as inputs and outputs;
        `view="forward"` exports its forward.

        Args:
            directory: the directory to write; it appears when it is complete and verified.
            options: see `peftfx.ExportOptions`. Options can also be given by name, as in `merge=False`.
            inputs, source, assets, progress, written, passes: see `peftfx.export_onnx`.
            changes: options by name; they override those in `options`.

        Raises:
            PeftfxError: an option makes no sense, the model cannot be captured or translated, or the directory cannot
                be written.
            VerificationError: ONNX Runtime and torch disagree; no files are left.

        Examples:
            >>> report = adapted.export("onnx", view="forward")
            >>> list(report.inputs)
            ['input_ids', 'attention_mask']
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
        """Gather a sharded model in the first process, call `work` with it there, and return the result.

        The weights are gathered one at a time, into memory-mapped files. The other processes wait, and return the same
        result.

        Args:
            what: the name of the method that every process calls.
            work: called in the first process, with the whole model.

        Raises:
            PeftfxError: another process does not call this method.
        """
        gathering(self, what)
        adapters = {name: self.adapter(name).gathered() for name in self.names()}
        with whole_base(self.base) as base:
            return on_first(lambda: work(self._over(base, adapters)))  # type: ignore[arg-type]

    def floating(self) -> AdaptedModel:
        """Return the same adapters over a base in floating point: the base itself, or its dequantised form.

        Each weight of a dequantised base is dequantised to float32 when it is read.
        """
        if self.source is self.base:
            return self
        flags = [(p, p.requires_grad) for p in self.adapters.parameters()]
        made = self._over(self._twin.floating(), {name: self.adapter(name) for name in self.names()})
        for p, flag in flags:
            p.requires_grad_(flag)
        return made

    def _over(self, base: nn.Module, adapters: Mapping[str, Adapter]) -> AdaptedModel:
        """Return the same adapters over another base that has the same modules."""
        made = AdaptedModel.on(base, self.sites, self.example, self.wanted)
        made.whole = self.whole
        for name, adapter in adapters.items():
            made._install(name, adapter)
        made.set_adapter(self.active)
        return made

    def show(self) -> Page:
        """Return the model as a page: its layers and what each adapter does there; a notebook shows the page.

        `adapted.show().save("page.html")` writes the page. Equal layers are drawn once. A click on a site shows more.

        Examples:
            >>> page = adapted.show().save("model.html")
        """
        from peftfx.pictures.adapted import show

        return show(self.base, self.sites, {name: self.adapter(name) for name in self.names()})

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()

    def print_readable(self) -> str:
        """Print the adapted graph as Python code, and return the text."""
        return str(self.whole_graph().module.print_readable())

    def graph(
        self,
        inputs: Mapping[str, object] | None = None,
        *,
        adapted: bool = True,
        view: str | View = "forward",
        exact: bool = False,
    ) -> Graph:
        """Return the graph of a call with these keyword arguments, or with example inputs, in the current mode.

        Args:
            inputs: as for a call. Values do not matter. Sizes matter only if the model fixes them or branches on them:
                the graph's `conditions` say for which sizes the graph holds.
            adapted: whether the graph has the active adapters; otherwise it is the base's own graph.
            view: `forward`, or another view of the model: `decode` has the key/value cache as inputs and outputs.
            exact: if a size is 1 and the model's code has a branch for size 1, whether the graph is that of this
                branch, which a call takes, or that of many sizes.

        Examples:
            >>> adapted.graph().run(torch.tensor([[3, 5, 8]]), torch.ones(1, 3, dtype=torch.long))[0].shape
            torch.Size([1, 3, 64])
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
        """Return a view of the base as an active soft prompt changes it, and the entry into the base."""
        entry = self.entry()
        if isinstance(view, Decode):
            view = under_invocations(view, self.invocations)
        return (view, None) if entry is None else prompt_in_view(view, entry)

    @property
    def invocations(self) -> Invocations:
        """The invocation tokens of the active adapters that act only from such tokens on."""
        rules = (rule for adapter in self.named.acting() for rule in adapter.rules)
        return tuple(dict.fromkeys(rule.invoked_by for rule in rules if rule.invoked_by))

    def entry(self) -> Entry | None:
        """Return the entry into the base that an active soft prompt takes, or None for the base's own forward."""
        prompts = (p for adapter in self.named.acting() for p in adapter.placements.prompts)
        return next((p.method.entry(self.base, p.site) for p in prompts), None)

    def view(self, name: str) -> View | None:
        """Return the view of this name, as an active soft prompt changes it, or None for the forward."""
        found = self.graphs.view(name)
        return None if found is None else self.under_prompt(found)[0]

    def generate(self, *args: object, **kwargs: object) -> object:
        """Generate tokens with the active adapters: the base's own `generate`, with its arguments and its result.

        The base's modules run it, as they run a call; so all that the base's class does is done. `adapter_names` has an
        adapter's name for each row. On the graph road, and with adapters that no module holds (soft prompts, aLoRA),
        the graph of the decode view runs each step. A graph has no hidden states, no `inputs_embeds`, and no cache of
        another kind than transformers' default.

        Raises:
            PeftfxError: the model does not generate text; a graph would run, and the model has no decode view, or an
                argument asks for what a graph cannot do.

        Examples:
            >>> adapted.generate(input_ids=torch.tensor([[3, 5, 8]]), max_new_tokens=4, do_sample=False).shape
            torch.Size([1, 7])
        """
        from peftfx.model.generation import generator, refuse_no_text

        refuse_no_text(self.base)
        if self.road == "modules" and self._runs_in_modules():
            return self._generate_in_modules(args, kwargs)
        refuse_names(kwargs)
        made = generator(self.source, self.view, lambda view, inputs: self.graph(inputs, view=view))
        return made.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> object:  # type: ignore[override]
        """Return an attribute of the base (`config`, `device`, ...); its methods run with the active adapters."""
        if isinstance(own := getattr(type(self), name, None), property) and own.fget is not None:
            return own.fget(self)  # Python comes here if a property raises an AttributeError, which is raised again
        try:
            return super().__getattr__(name)
        except AttributeError:
            refuse_layers_of_peft(name)
            base = super().__getattr__(BASE)
            value = getattr(base, name)
            if not inspect.ismethod(value):
                return value
            if name in COUNTS:
                return functools.partial(value.__func__, self)
            return base_method(base, name, value, self._in_modules if self._runs_in_modules() else None)  # type: ignore[arg-type]

    def _apply(self, fn: object, recurse: bool = True) -> AdaptedModel:
        """Move or cast the model, drop the graphs made for the old device and dtype, and cast the examples."""
        self.named.apart("the model is moved or cast")
        self._twin.plain.restore()
        self.graphs.forget()
        self.example = pytree.tree_map_only(Tensor, lambda t: t.to(fn(t).dtype), self.example)  # type: ignore[operator]
        adapters = [self.adapter(name) for name in self.names()]
        for adapter in adapters:
            adapter.moved_with_base = True
        try:
            super()._apply(fn, recurse)
        finally:
            for adapter in adapters:
                adapter.moved_with_base = False
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
    """Return an AdaptedModel without state, for `copy` and `pickle`, which cannot find its class by a name."""
    cls = _subclass(base_class)  # type: ignore[arg-type]
    return cls.__new__(cls)
