"""`capture` makes a Graph of a module and example inputs, for one view of the model at a time.

A view is one signature in one mode, train or eval: the names of the tensor arguments, and the values of all other
arguments. Capture uses `torch.export` in non-strict mode, which runs the module on fake tensors. So the size of the
example and of the model cost nothing, and a module built under `FakeTensorMode` is captured without memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from peftfx.analysis.no_grad_regions import inline_no_grad
from peftfx.analysis.roles import find_sites
from peftfx.analysis.running import called_modules
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError, raise_if_memory_is_out
from peftfx.graph.capturing.axis_symbols import place_of, symbols_of, tied
from peftfx.graph.capturing.empty_sizes import Question, asked_if_empty, filled_of
from peftfx.graph.capturing.free_sizes import count_from_start, repeated_lists, size_arithmetic
from peftfx.graph.capturing.mask_loops import over_masks
from peftfx.graph.capturing.masks import broadcast_masks
from peftfx.graph.capturing.module_casts import casting_in_graph
from peftfx.graph.capturing.recurrences import recurrences
from peftfx.graph.capturing.sides import Sides
from peftfx.graph.capturing.size_conditions import Note, conditions_of, fixed_by, noted
from peftfx.graph.capturing.stamping import stamped
from peftfx.graph.capturing.tensors_in_pieces import concatenate_filled, read_apart
from peftfx.graph.contexts import fake_mode_of, isolated, sparing, unchanged
from peftfx.graph.graph import BASE, CONSTANTS, Graph, TensorSpec, path_name
from peftfx.graph.lazy_weights import faked
from peftfx.graph.linking import link
from peftfx.graph.places import name_places
from peftfx.graph.written import refuse_written
from peftfx.patterns.find import with_patterns
from peftfx.telling import tell_share
from peftfx.views.capturing.errors import capture_error
from peftfx.views.capturing.settling import on_general_sides
from peftfx.views.decode import PRESENT
from peftfx.views.entry import Entry, EntryCall, forward
from peftfx.views.image_sizes import free_images
from peftfx.views.view import MAY_BE_EMPTY, Axes, name_axes, without_cache


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
        axes: a name for each axis of each tensor; by default from `peftfx.views.view.name_axes`. Axes of one name have
            one size. A named axis is free, even if its size is 1, unless the model's own code fixes it. An axis named
            `None` keeps its size. All axes of a tensor that is not listed are free.
        call: a function that runs the model with `inputs`; by default the model's forward.
        entry: a way to make the call with a soft prompt; see `peftfx.views.entry`.
        stamp: whether only two of equal layers are traced, and their nodes copied for the others. The graph is the same
            without, but takes longer.

    Raises:
        PeftfxError: the model's code cannot be captured (it branches on values, or returns no tensors), or writes into
            its own parameters.

    Example:
        >>> graph = peftfx.capture(torch.nn.Linear(4, 2), {"input": torch.ones(3, 4)}, axes={"input": ("batch", None)})
        >>> graph.run(torch.ones(5, 4))[0].shape
        torch.Size([5, 2])
    """
    inputs = example_inputs(model) if inputs is None else inputs
    if entry is not None and call is None:
        entry.check(inputs)
    leaves, in_spec = pytree.tree_flatten_with_path(dict(inputs))
    tensors = {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    if axes is None:
        axes = name_axes(tensors)
        freed = free_images(axes, model, inputs)
        if freed is not axes:
            with suppress(PeftfxError):  # then the model's code takes no free size, and the example's is kept
                return capture(model, inputs, axes=freed, call=call, entry=entry, stamp=stamp)
    _refuse_checkpointing(model)
    wrapper = _Flat(model, in_spec, [leaf for _, leaf in leaves], call or forward, entry)
    wrapper.train(model.training)

    def captured(sides: Sides) -> Graph:
        return _captured(wrapper, tensors, axes, sides, stamp=stamp)

    return on_general_sides(captured, wrapper, tensors)


def _captured(wrapper: _Flat, tensors: Mapping[str, torch.Tensor], axes: Axes, sides: Sides, *, stamp: bool) -> Graph:
    """Capture a model, and take these sides of its branches on booleans of the call's inputs."""
    model, entry = wrapper.get_submodule(BASE), wrapper.entry
    with isolated(model), sparing(model), unchanged(model), faked(model), fake_mode_of(model), without_cache(model):
        examples = {name: _fresh(model, t, axes.get(name)) for name, t in tensors.items()}
        free = tuple(_dims(t, axes.get(name)) for name, t in examples.items())
        named = [axes.get(name) or (None,) * t.ndim for name, t in examples.items()]
        try:
            loops = nullcontext() if model.training else recurrences(model)
            with (
                noted(sides.decide) as notes,
                asked_if_empty() as questions,
                tied(named),
                broadcast_masks(),
                repeated_lists(),
                casting_in_graph(),
                over_masks(),
                size_arithmetic(),
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
            raise capture_error(model, raised, entry, wrapper.call) from raised
    graph = _as_graph(model, module, program.call_spec.out_spec, examples, axes, notes, questions)
    return dataclasses.replace(graph, decisions=tuple(sides.made))


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


def _fresh(model: nn.Module, example: torch.Tensor, axes: tuple[str | None, ...] | None) -> torch.Tensor:
    """Return a new tensor like `example`: if one tensor were passed twice, the graph would read the wrong input.

    A named axis of size 1 gets a larger size, because a capture would treat the 1 as a property of the model.
    """
    names = axes or (None,) * example.ndim
    shape = [
        size if size != 1 or name is None else _MORE_THAN_1.get(name, 3) for size, name in zip(example.shape, names)
    ]
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


#: Checks of types and sizes that torch.export adds to a program. Autocast crashes on the first of them. The others are
#: stricter than the model's code, and refuse sizes that the code accepts.
_ASSERTIONS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


def _as_graph(
    model: nn.Module,
    module: fx.GraphModule,
    out_spec: pytree.TreeSpec,
    tensors: Mapping[str, torch.Tensor],
    axes: Axes,
    notes: Sequence[Note],
    questions: Sequence[Question],
) -> Graph:
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    inline_no_grad(module)
    read_apart(graph)
    concatenate_filled(graph)
    count_from_start(graph)
    constants = nn.Module()
    module.add_module(CONSTANTS, constants)  # fx's own checks look there
    for node in list(graph.nodes):
        if node.op == "get_attr" and not _owns(model, str(node.target)):
            name = str(node.target).replace(".", "_")
            value = _attribute(module, str(node.target))
            if not hasattr(constants, name):
                if isinstance(value, torch.Tensor):
                    constants.register_buffer(name, value)
                else:
                    assert isinstance(value, nn.Module)
                    constants.add_module(name, value)
            node.target = f"{CONSTANTS}.{name}"
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    ran = called_modules(module)
    graph.eliminate_dead_code()
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    specs, sizes = [], {}
    symbols: dict[str, str | int] = {}
    sources = symbols_of(node.meta["val"] for node in placeholders)
    lines: dict[str, str] = {}
    for place, (node, (name, tensor)) in enumerate(zip(placeholders, tensors.items(), strict=True)):
        shape: list[int | str] = []
        for i, size in enumerate(node.meta["val"].shape):
            axis = (axes.get(name) or (None,) * tensor.ndim)[i] or f"{name}.{i}"
            fixed = _constant(size)
            shape.append(axis if fixed is None else fixed)
            symbol = sources.get(place_of(place, i))
            symbols[str(symbol)] = shape[-1]
            if fixed is None:
                sizes[axis] = int(tensor.shape[i])
            elif symbol is not None and axis not in lines and (line := fixed_by(notes, symbol, fixed)):
                lines[axis] = line
        specs.append(TensorSpec(name, tensor.dtype, tuple(shape)))
        _rename(node, name.replace(".", "_"))
    name_places(module, model)
    linked = link(graph, {BASE: model, CONSTANTS: constants})
    told = {
        "conditions": conditions_of(notes, symbols),
        "filled": filled_of(questions, symbols, MAY_BE_EMPTY),
        "fixed": lines,
    }
    result = Graph(linked, tuple(specs), out_spec, sizes, model.training, None, **told)  # type: ignore[arg-type]
    refuse_written(result)
    tell_share("sites", 0.9)
    kept = [name for name in result.outputs if name.startswith(f"{PRESENT}.")]
    sites = find_sites(result, kept)
    sites = dataclasses.replace(sites, unread=ran - sites.called - sites.reads.keys())
    result.sites = with_patterns(result, sites)
    return result


def _constant(size: int | torch.SymInt) -> int | None:
    """Return the size of an axis that the example or the model's code fixes, or None for a free axis."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _owns(model: nn.Module, target: str) -> bool:
    """Return whether a captured attribute is the model's own. torch.export adds tensors that the code makes."""
    return _own(model, target) is not None


def _own(model: nn.Module, target: str) -> object:
    path = target.removeprefix(f"{BASE}.")
    try:
        return None if path == target else _attribute(model, path)
    except AttributeError:
        return None


def _attribute(module: nn.Module, target: str) -> object:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _rename(node: fx.Node, name: str) -> None:
    node._rename(name)
    node.target = node.name
