"""The class `AdapterCalls`: the call of an adapted model: its road, the adapter of each row, penalties in the loss."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftfx.errors import CaptureError, PeftfxError, shown, warn
from peftfx.generation.invocation import OFFSETS
from peftfx.graph.capturing.trace_lock import TRACING
from peftfx.graph.graph import Graph
from peftfx.hosting.call import CURRENT, acting, acting_by_row
from peftfx.hosting.call_inputs import invocations, take
from peftfx.hosting.checkpointing import checkpoint_base, is_checkpointed
from peftfx.hosting.other_forward import run_other
from peftfx.model.graphs.runs import Checkpoints
from peftfx.model.own_generation import refuse_other_count, rows_of_each
from peftfx.model.peft_surface import PeftSurface
from peftfx.model.processes.gathered import gathered_for, refuse_graph
from peftfx.views.arguments import named_arguments
from peftfx.views.row_adapters import NAMES, NO_ADAPTER

_CACHES = ("use_cache", "past_key_values")  #: arguments by which a model's own code reads or returns a cache
LOSS = "loss"  #: the output that methods add their penalties to


class AdapterCalls(PeftSurface):
    """Adapters by name, and the calls of the model with them."""

    @abstractmethod
    def graph_of_call(self, named: Mapping[str, object]) -> Graph:
        """Return the graph that a call with these arguments runs on the graph road."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with the active adapters, also where other code has replaced `forward`."""
        if self.training and not torch.compiler.is_compiling():
            self.settle_dropout(self.named.called)
        with self._passing_gradients():
            if "forward" in vars(self):
                return self.run_other(super().__call__, args, kwargs)
            return super().__call__(*args, **kwargs)

    def run_other(self, call: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Run a call whose `forward` other code has set, as TRL does, with the active adapters.

        Args:
            call: runs the call, with arguments.
            args, kwargs: the arguments.

        Raises:
            PeftfxError: the other code does not call the model's own forward, and skips an adapter.
        """
        names = self.named.called
        inner, given = self._beside(args, kwargs)
        if not self.modules_road.obstacle(names, dearer=False):
            self._checkpoint_modules()
        own = inner if self.road == "modules" and kwargs.get(NAMES) is None else None
        output, called = run_other(self.modules_road, names, call, args, kwargs, own, given)
        return output if called else self._penalised(output)

    def _call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        CURRENT.called, names = True, kwargs.get(NAMES)
        if CURRENT.entered is not None and CURRENT.entered == self.modules_road.keys(self.named.called):
            return self._penalised(self.base(*args, **kwargs))  # with what a soft prompt makes of the arguments
        kwargs = {key: value for key, value in kwargs.items() if key != NAMES}
        kwargs, given = self._beside_graph(kwargs) if self.road == "graph" else self._beside(args, kwargs)
        if names is not None:
            return self._run_by_row(names, args, kwargs)
        if self.road == "graph":
            refuse_graph(self, self.obstacle, hosted=self._runs_in_modules())
            with acting(None):  # a forward that other code set lets adapters act, and a capture is of the base
                return self._run_graph_or_tell(args, kwargs)
        names = self.named.called
        self._checkpoint_modules()
        entry = self.modules_road.entry(names)
        if entry is not None:
            args, kwargs = (), named_arguments(self.base, args, kwargs)
        return self._penalised(self.modules_road.run(names, entry, args, kwargs, given))

    def _checkpoint_modules(self) -> None:
        """Checkpoint the base's own layers, if that was asked for while calls ran a graph, and modules run now."""
        asked = self.checkpoints
        if asked is not None and not asked.in_modules and self.named.called:
            checkpoint_base(self.base, asked.given or None, asked.options)
            self.checkpoints = replace(asked, in_modules=True)

    def _beside(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[Mapping[str, object], Mapping[str, Tensor]]:
        """Split a call's arguments into those of the model and the tensors that only methods read."""
        known = [rule for name in self.names() for rule in self.adapter(name).rules]
        if not any(rule.inputs or rule.invoked_by for rule in known):
            return kwargs, {}
        kwargs, given = self._taken(kwargs)
        offsets = kwargs.pop(OFFSETS, None)
        ids = named_arguments(self.base, args, kwargs).get("input_ids")
        rules = [rule for adapter in self.named.acting() for rule in adapter.rules]
        return kwargs, given | invocations(rules, ids, offsets)

    def _beside_graph(self, kwargs: Mapping[str, object]) -> tuple[Mapping[str, object], Mapping[str, Tensor]]:
        """Split a call's arguments as `_beside`, for a graph, which finds invocations itself."""
        if kwargs.get(OFFSETS) is not None and any(r.invoked_by for n in self.names() for r in self.adapter(n).rules):
            what = "the graph of a forward finds invocations in its input_ids, and has no such input"
            raise PeftfxError(what, OFFSETS, 'leave it out, or take the other road: transform(..., road="modules")')
        return self._taken(kwargs)

    def _taken(
        self, kwargs: Mapping[str, object], *, whole: bool = True
    ) -> tuple[dict[str, object], dict[str, Tensor]]:
        """Split a call's arguments into those of the model and those of methods, such as `task_ids`."""
        known = (rule for name in self.names() for rule in self.adapter(name).rules)
        acting = (rule for adapter in self.named.acting() for rule in adapter.rules)
        return take(known, acting, kwargs, whole=whole)

    def _run_by_row(self, names: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Run a call in which each row of the batch has the adapter of its name."""
        with self._by_row(names, 1, (args, kwargs)):
            return self.base(*args, **kwargs)

    @contextmanager
    def _by_row(self, names: object, times: int, given: object) -> Iterator[None]:
        """Let each row have the adapter of its name; inside `disable_adapter` none, as in HF PEFT.

        Args:
            names: the names.
            times: for how many rows each name stands in turn.
            given: the call's arguments.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise PeftfxError(f"not a list of names: {shown(names)}", NAMES, "give one adapter's name for each row")
        if self.named.folded:
            raise PeftfxError("adapters are merged: rows cannot choose among them", NAMES, "unmerge_adapter() first")
        if self.training:
            raise PeftfxError(f"{NAMES} works in eval mode only", NAMES, "call eval() first")
        for name in set(names) - {NO_ADAPTER}:
            self.adapter(name)
        refuse_other_count(names, given)
        names = [NO_ADAPTER] * len(names) if self.named.disabled else names
        rows = self.modules_road.rows([name for name in names for _ in range(times)])
        with self.modules_road.acting(()), acting_by_row(rows):
            yield

    def _runs_in_modules(self) -> bool:
        """Return whether the base's own methods run with the active adapters, inside the base's modules."""
        names, rules = self.named.called, (rule for adapter in self.named.acting() for rule in adapter.rules)
        hosted = not self.modules_road.obstacle(names, dearer=False) and self.modules_road.entry(names) is None
        return hosted and not any(rule.invoked_by for rule in rules)

    def _generate_in_modules(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Run the base's own `generate`, with the active adapters or with those that `adapter_names` has for rows."""
        with gathered_for(self, "generate") as again:
            if again:
                return self.generate(*args, **kwargs)  # type: ignore[operator]
        names, rows = kwargs.get(NAMES), functools.partial(rows_of_each, self.base, kwargs)
        own = {name: value for name, value in kwargs.items() if name != NAMES}
        if names is not None:
            with self._by_row(names, rows(NAMES), (args, own)):
                return self.base.generate(*args, **own)  # type: ignore[operator]
        with self._in_modules(own, rows) as own:
            return self.base.generate(*args, **own)  # type: ignore[operator]

    @contextmanager
    def _in_modules(
        self, kwargs: Mapping[str, object], rows: Callable[[str], int] = lambda name: 1
    ) -> Iterator[dict[str, object]]:
        """Let the active adapters act in what a method of the base runs; yield those arguments that are the base's.

        Args:
            kwargs: the arguments of the call.
            rows: returns for how many rows each entry of an argument stands that methods read.
        """
        own, given = self._taken(kwargs, whole=False)  # a method such as `num_parameters` runs no layer
        given = {name: value.repeat_interleave(rows(name), 0) for name, value in given.items()}
        with self._passing_gradients(), self.modules_road.within(self.named.called, given):
            yield own

    def _passing_gradients(self) -> AbstractContextManager[None]:
        """Let gradients pass quantised layers that bitsandbytes repacks in place."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nullcontext()
        return self._twin.plain.passing_gradients(everywhere=self.training)

    def _penalised(self, output: object) -> object:
        loss, penalties = output.get(LOSS) if isinstance(output, dict) else None, self._penalties()
        if loss is not None and penalties:
            output[LOSS] = sum(penalties, loss)  # type: ignore[index]
        return output

    def _penalties(self) -> list[Tensor]:
        """Return the terms that the active adapters add to the model's loss."""
        found = (adapter.penalty() for adapter in self.named.acting())
        return [penalty for penalty in found if penalty is not None]

    def _run_graph_or_tell(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Run a call's graph. If there is none, tell of the other road, where that can run the adapters."""
        try:
            return self._run_graph(args, kwargs)
        except PeftfxError as error:
            named = named_arguments(self.base, args, kwargs)
            asked = next((name for name in _CACHES if named.get(name) not in (None, False)), None)
            if asked is not None:
                what = "calls run a graph here, which takes and returns no cache of keys and values"
                hint = 'leave it out; generate has a cache; or take the other road: transform(..., road="modules")'
                raise PeftfxError(what, asked, hint) from error
            captured = self.wanted == "graph" and error.__cause__ is not None  # code, or a hook, that no graph can have
            if type(error) not in (PeftfxError, CaptureError) or not (captured or self._runs_in_modules()):
                raise
            hint = f"{error.hint}; or " if error.hint else ""
            other = f'{hint}take the other road: peftfx.transform(..., road="modules")'
            raise PeftfxError(error.what, error.where, other) from error

    def _run_graph(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        graph, run, tensors = self._find(args, kwargs)
        flat = run(*tensors)
        if LOSS in graph.outputs:
            at = graph.outputs.index(LOSS)
            flat[at] = sum(self._penalties(), flat[at])
        return pytree.tree_unflatten(flat, graph.out_spec)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[Graph, Callable[..., list[Tensor]], list[Tensor]]:
        """Return a call's graph, the function that runs it, and its inputs; `torch.compile` skips this search."""
        named = named_arguments(self.base, args, kwargs)
        leaves, _ = pytree.tree_flatten_with_path(named)
        tensors = [v for _, v in leaves if isinstance(v, Tensor)]
        asked = self.checkpoints
        if asked is None and self.training and is_checkpointed(self.base):
            asked = Checkpoints()
        with TRACING:  # wait: another thread may be making the graph that this call needs
            graph = self.graph_of_call(named)
            if graph.backwards and torch.is_grad_enabled():
                self._tell_backwards(graph.backwards)
            return graph, self.graphs.runs.runner(graph, tensors, asked if self.training else None), tensors

    def _tell_backwards(self, backwards: Sequence[str]) -> None:
        """Warn that a graph's gradients are not those of the model's code, if adapters are trained."""
        if not any(parameter.requires_grad for adapter in self.named.acting() for parameter in adapter.parameters()):
            return
        obstacle = "" if self.wanted == "graph" else self.modules_road.obstacle(self.named.called, dearer=False)
        advice = f"no module can run the adapter: {obstacle}" if obstacle else 'train with road="modules"'
        steps = ", ".join(backwards)
        warn(f"the model's code has a backward of its own ({steps}), and the graph uses torch's instead: {advice}")
