"""`capture` makes a Graph of a module and example inputs, for one view of the model at a time.

A view is one signature in one mode, train or eval: the names of the tensor arguments, and the values of all other
arguments. Capture uses `torch.export` in non-strict mode, which runs the module on fake tensors. So the size of the
example and of the model cost nothing, and a module built under `FakeTensorMode` is captured without memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext, suppress

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from peftfx.bases.embeddings import output_embeddings
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.graph.capturing.loops.mask_loops import over_masks
from peftfx.graph.capturing.loops.recurrences import recurrences
from peftfx.graph.capturing.masks import broadcast_masks
from peftfx.graph.capturing.module_casts import casting_in_graph
from peftfx.graph.capturing.overflows import limits_of_overflows
from peftfx.graph.capturing.sides import Sides
from peftfx.graph.capturing.sizes.axis_symbols import tied
from peftfx.graph.capturing.sizes.empty_sizes import asked_if_empty
from peftfx.graph.capturing.sizes.kept_free import kept_free
from peftfx.graph.capturing.sizes.size_conditions import noted
from peftfx.graph.capturing.stamping import stamped
from peftfx.graph.contexts import fake_mode_of, isolated, sparing, unchanged
from peftfx.graph.graph import BASE, Graph, path_name
from peftfx.graph.lazy_weights import faked
from peftfx.memory.garbage import rarely_collected
from peftfx.sites.sites import without_roles
from peftfx.telling import tell_share
from peftfx.views.arguments import refuse_hidden_tensors
from peftfx.views.capturing.attributes_of_tensors import attributes_kept
from peftfx.views.capturing.errors import capture_error
from peftfx.views.capturing.fixed_sides import fixed_sides
from peftfx.views.capturing.longer import with_longer
from peftfx.views.capturing.own_backwards import own_backwards
from peftfx.views.capturing.program_graph import as_graph
from peftfx.views.capturing.settling import on_general_sides, served
from peftfx.views.capturing.whole_blocks import with_whole_blocks
from peftfx.views.entry import Entry, EntryCall, forward
from peftfx.views.forward_axes import axes_of_forward
from peftfx.views.images.sizes import free_images, with_fixed_sizes
from peftfx.views.view import Axes, as_captured, keep_ones


@rarely_collected()
def capture(
    model: nn.Module,
    inputs: Mapping[str, object] | None = None,
    *,
    axes: Axes | None = None,
    call: EntryCall | None = None,
    entry: Entry | None = None,
    stamp: bool = True,
) -> Graph:
    """Capture `model` in its current mode (train or eval), as called with `inputs`.

    Args:
        model: any module; its parameters are shared with the graph, never copied.
        inputs: keyword arguments of the model's forward. Tensors, nested or not, become inputs of the graph; everything
            else is a constant of this view. Only the dtypes and sizes of the tensors matter. By default examples are
            made from a transformers model's config.
        axes: a name for each axis of each tensor; by default from `peftfx.views.forward_axes`. Axes of one name have
            one size. A named axis is free, even if its size is 1, unless the model's own code fixes it. An axis named
            `None` keeps its size. All axes of a tensor that is not listed are free.
        call: a function that runs the model with `inputs`; by default the model's forward.
        entry: a way to make the call with a soft prompt; see `peftfx.views.entry`.
        stamp: whether only two of equal layers are traced, and their nodes copied for the others. The graph is the same
            without, but takes longer.

    Raises:
        PeftfxError: the model's code cannot be captured (it branches on values, or returns no tensors), or writes into
            its own parameters.

    Examples:
        >>> graph = peftfx.capture(torch.nn.Linear(4, 2), {"input": torch.ones(3, 4)}, axes={"input": ("batch", None)})
        >>> graph.run(torch.ones(5, 4))[0].shape
        torch.Size([5, 2])
    """
    inputs = example_inputs(model) if inputs is None else inputs
    if entry is not None and call is None:
        entry.check(inputs)
    leaves, in_spec = pytree.tree_flatten_with_path(dict(inputs))
    refuse_hidden_tensors(leaves)
    tensors = {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    if not tensors:
        given = ", ".join(inputs) or type(model).__name__
        raise PeftfxError("the call gives no tensor, and a graph has tensors for inputs", given, "pass tensors")
    if axes is None:
        axes = with_fixed_sizes(axes_of_forward(model, inputs), model, inputs)
        freed = free_images(axes, model, inputs)
        if freed is not axes:
            with suppress(PeftfxError):  # then the model's code takes no free size, and the example's is kept
                return capture(model, inputs, axes=freed, call=call, entry=entry, stamp=stamp)
        broadcast = keep_ones(axes, tensors)
        if broadcast != axes:
            with suppress(PeftfxError):  # then an axis of size 1 is repeated along another input's, and stays 1
                return capture(model, inputs, axes=axes, call=call, entry=entry, stamp=stamp)
            axes = broadcast
    _refuse_checkpointing(model)
    wrapper = _Flat(model, in_spec, [leaf for _, leaf in leaves], call or forward, entry)
    wrapper.train(model.training)

    def captured(sides: Sides) -> Graph:
        return with_longer(
            lambda lengths: _captured(wrapper, tensors, axes, sides, lengths, stamp=stamp),
            lambda graph: served(graph, wrapper, tensors),
        )

    graph = with_whole_blocks(on_general_sides(captured, wrapper, tensors))
    lone: frozenset[str] = getattr(call, "lone", frozenset())
    if lone:
        head = output_embeddings(model)
        heads = [path for path, module in own_modules(model) if module is head]
        graph.sites = without_roles(graph.sites, lone, heads)
    fixed = tuple(fixed_sides(graph, getattr(call, "fixed", ())))
    return dataclasses.replace(graph, decisions=(*graph.decisions, *fixed)) if fixed else graph


def _captured(
    wrapper: _Flat,
    tensors: Mapping[str, torch.Tensor],
    axes: Axes,
    sides: Sides,
    lengths: Mapping[str, int],
    *,
    stamp: bool,
) -> Graph:
    """Capture a model, and take these sides of its branches on booleans of the call's inputs.

    Args:
        wrapper: the model.
        tensors: the example's inputs by name.
        axes: a name for each axis of each input.
        sides: decides, in one capture after another.
        lengths: sizes of named axes that are not the example's.
        stamp: see `capture`.
    """
    sides.begin()
    model, entry = wrapper.get_submodule(BASE), wrapper.entry
    with (
        attributes_kept(model),
        isolated(model),
        sparing(model),
        unchanged(model),
        faked(model),
        fake_mode_of(model),
        as_captured(model),
    ):
        examples = {name: _fresh(model, name, t, axes.get(name), lengths) for name, t in tensors.items()}
        free = tuple(_dims(t, axes.get(name)) for name, t in examples.items())
        named = [axes.get(name) or (None,) * t.ndim for name, t in examples.items()]
        try:
            loops = nullcontext() if model.training else recurrences(model)
            with (
                noted(sides.decide) as notes,
                asked_if_empty() as questions,
                own_backwards(model) as backwards,
                tied(named),
                broadcast_masks(),
                casting_in_graph(),
                over_masks(),
                kept_free(model),
                limits_of_overflows(),
                loops,
                stamped(model, own_modules) if stamp else nullcontext(),
            ):
                program = torch.export.export(
                    wrapper, tuple(examples.values()), dynamic_shapes={"flat": free}, strict=False
                )
            tell_share("nodes into a graph", 0.7)
            module = program.module(check_guards=False)
        except PeftfxError:
            raise
        except Exception as error:
            raised = error.__cause__ if isinstance(error, _Raised) and error.__cause__ else error
            raise_if_memory_is_out(raised)
            raise capture_error(model, raised, entry, wrapper.call, tensors) from raised
    graph = as_graph(model, module, program.call_spec.out_spec, examples, axes, notes, questions)
    return dataclasses.replace(graph, decisions=tuple(sides.made), backwards=(*graph.backwards, *backwards))


class _Flat(nn.Module):
    """`base` with a flat positional signature. Arguments that are not tensors are constants."""

    def __init__(
        self, base: nn.Module, spec: pytree.TreeSpec, leaves: list[object], call: EntryCall, entry: Entry | None
    ) -> None:
        super().__init__()
        self._modules[BASE] = base
        self.spec, self.leaves, self.call, self.entry = spec, leaves, call, entry
        if entry is not None:
            self.register_buffer(entry.name, entry.hole(base))

    def train(self, mode: bool = True) -> _Flat:
        """Set only this module's own flag. The caller sets the modes inside `base`."""
        self.training = mode
        return self

    def forward(self, *flat: torch.Tensor) -> object:
        tensors = iter(flat)
        leaves = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        base, arguments = self.get_submodule(BASE), pytree.tree_unflatten(leaves, self.spec)
        try:
            if self.entry is None:
                return self.call(base, arguments)
            return self.entry(self.call, base, self.get_buffer(self.entry.name), arguments)
        except PeftfxError:
            raise
        except Exception as error:
            raise _Raised from error


class _Raised(Exception):
    """A wrapper whose cause is the error of the model's code. Without it torch prints the graph so far."""

    @property
    def partial_fx_graph(self) -> str:
        raise AttributeError("partial_fx_graph")

    @partial_fx_graph.setter
    def partial_fx_graph(self, graph: str) -> None:
        pass


def _fresh(
    model: nn.Module,
    tensor: str,
    example: torch.Tensor,
    axes: tuple[str | None, ...] | None,
    lengths: Mapping[str, int],
) -> torch.Tensor:
    """Return a new tensor like `example`: if one tensor were passed twice, the graph would read the wrong input.

    A named axis of size 1 gets a larger size, because a capture would treat the 1 as a property of the model.
    """
    names = axes or (None,) * example.ndim
    shape = [
        size if size != 1 or name is None else _MORE_THAN_1.get(name, 3) for size, name in zip(example.shape, names)
    ]
    shape = [lengths.get(name or f"{tensor}.{i}", size) for i, (size, name) in enumerate(zip(shape, names))]
    device = next((p.device for p in model.parameters()), example.device)
    return torch.zeros(shape, dtype=example.dtype, device=example.device if example.ndim == 0 else device)


_MORE_THAN_1 = {"batch": 2}


def _dims(example: torch.Tensor, axes: tuple[str | None, ...] | None) -> dict[int, object]:
    """Return which axes torch.export leaves free. A needless free axis can cost minutes, as in Swin's windows."""
    names = axes or ("free",) * example.ndim
    return {i: Dim.STATIC if name is None else Dim.AUTO for i, name in enumerate(names)}


def _refuse_checkpointing(model: nn.Module) -> None:
    active = next((n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)), None)
    if model.training and active is not None:
        raise PeftfxError(
            "gradient checkpointing would have no effect: a captured graph keeps its activations",
            active or type(model).__name__,
            "call model.gradient_checkpointing_disable() first",
        )
