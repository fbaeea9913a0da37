"""A program of torch.export as a Graph: its tensors, axes, conditions and sites, by the model's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from peftfx.analysis.roles import find_sites
from peftfx.analysis.running import called_modules
from peftfx.analysis.weight_ops import module_path
from peftfx.errors import CaptureError
from peftfx.graph.capturing.sizes.axis_symbols import place_of, symbols_of
from peftfx.graph.capturing.sizes.empty_sizes import Question, filled_of
from peftfx.graph.capturing.sizes.free_sizes import count_from_start
from peftfx.graph.capturing.sizes.size_conditions import Note, conditions_of, fixed_by
from peftfx.graph.capturing.squeezed import keep_free_axes
from peftfx.graph.capturing.tensors_in_pieces import concatenate_filled, read_apart
from peftfx.graph.graph import BASE, CONSTANTS, Graph, TensorSpec
from peftfx.graph.linking import link
from peftfx.graph.places import name_places
from peftfx.graph.written import refuse_written
from peftfx.patterns.find import with_patterns
from peftfx.telling import tell_share
from peftfx.views.capturing.below_zero import longest_filled
from peftfx.views.capturing.programs.computed_biases import add_computed_biases
from peftfx.views.capturing.programs.counted_places import write_counted
from peftfx.views.capturing.programs.equal_counts import view_by_largest_count
from peftfx.views.capturing.programs.no_grad_regions import inline_no_grad
from peftfx.views.capturing.programs.strided import choose_by_indices
from peftfx.views.decode import PRESENT
from peftfx.views.view import MAY_BE_EMPTY, Axes

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


def as_graph(
    model: nn.Module,
    module: fx.GraphModule,
    out_spec: pytree.TreeSpec,
    tensors: Mapping[str, torch.Tensor],
    axes: Axes,
    notes: Sequence[Note],
    questions: Sequence[Question],
) -> Graph:
    """Return the graph of a captured program, with its sites. The program's own graph is changed.

    Args:
        model: the captured module.
        module: the program, whose inputs are the tensors.
        out_spec: how the program's outputs are nested.
        tensors: the example's tensors by name.
        axes: the names of their free axes.
        notes: what the capture assumed of sizes.
        questions: where the model's code asked if an axis is empty.
    """
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    writes = inline_no_grad(module)
    read_apart(graph)
    concatenate_filled(graph)
    count_from_start(graph)
    choose_by_indices(graph)
    write_counted(graph)
    view_by_largest_count(graph)
    squeezes = [_not_one(node, size) for node, size in keep_free_axes(graph)]
    filled_up = longest_filled(graph)
    constants = _move_constants(module, model)
    add_computed_biases(graph)
    ran = called_modules(module)
    graph.eliminate_dead_code()
    specs, sizes, symbols, lines = _name_inputs(graph, tensors, axes, notes)
    name_places(module, model)
    linked = link(graph, {BASE: model, CONSTANTS: constants})
    told = {
        "conditions": conditions_of([*filled_up, *notes, *squeezes], symbols),
        "filled": filled_of(questions, symbols, MAY_BE_EMPTY),
        "fixed": lines,
        "backwards": writes,
    }
    result = Graph(linked, specs, out_spec, sizes, model.training, None, **told)  # type: ignore[arg-type]
    refuse_written(result)
    tell_share("sites", 0.9)
    kept = [name for name in result.outputs if name.startswith(f"{PRESENT}.")]
    sites = find_sites(result, kept)
    sites = dataclasses.replace(sites, unread=ran - sites.called - sites.reads.keys())
    result.sites = with_patterns(result, sites)
    return result


def _not_one(node: fx.Node, size: torch.SymInt) -> Note:
    """Return that an axis which the code squeezes is there: at a size of 1 the code takes it away."""
    where = f"squeeze, in {module_path(node) or 'the model'}"
    return Note(sympy.Ne(size.node.expr, 1), where, code=True, edge=True, text="")


def _move_constants(module: fx.GraphModule, model: nn.Module) -> nn.Module:
    """Return a module with what the program reads and the model does not own, and drop torch.export's assertions."""
    constants = nn.Module()
    module.add_module(CONSTANTS, constants)  # fx's own checks look there
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not _owns(model, str(node.target)):
            name = str(node.target).replace(".", "_")
            value = _attribute(module, str(node.target))
            if not hasattr(constants, name):
                if isinstance(value, torch.Tensor):
                    constants.register_buffer(name, value)
                elif isinstance(value, nn.Module):
                    constants.add_module(name, value)
                else:
                    what = (
                        f"the model's code makes an object in its forward that no graph has: a {type(value).__name__}"
                    )
                    hint = "make what it gives once, and keep it as a buffer"
                    raise CaptureError(f"cannot capture this model: {what}", type(model).__name__, hint)
            node.target = f"{CONSTANTS}.{name}"
        if node.target in _ASSERTIONS:
            module.graph.erase_node(node)
    return constants


def _name_inputs(
    graph: fx.Graph, tensors: Mapping[str, torch.Tensor], axes: Axes, notes: Sequence[Note]
) -> tuple[tuple[TensorSpec, ...], dict[str, int], dict[str, str | int], dict[str, str]]:
    """Name the inputs of a graph.

    Return what the inputs are, the example's sizes of free axes, the axis or size of each symbol, and the line of the
    model's code that fixed an axis, where known.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    specs, sizes = list[TensorSpec](), dict[str, int]()
    symbols, lines = dict[str, str | int](), dict[str, str]()
    sources = symbols_of(node.meta["val"] for node in placeholders)
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
    return tuple(specs), sizes, symbols, lines


def _constant(size: int | torch.SymInt) -> int | None:
    """Return the size of an axis that the example or the model's code fixes, or None for a free axis."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _owns(model: nn.Module, target: str) -> bool:
    """Return whether a captured attribute is the model's own. torch.export adds tensors that the code makes."""
    path = target.removeprefix(f"{BASE}.")
    try:
        return path != target and _attribute(model, path) is not None
    except AttributeError:
        return False


def _attribute(module: nn.Module, target: str) -> object:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _rename(node: fx.Node, name: str) -> None:
    node._rename(name)
    node.target = node.name
