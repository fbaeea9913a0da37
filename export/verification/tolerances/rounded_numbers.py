"""Numbers of a model's code that are in half precision in its graph and in ONNX alike, as torch rounds them.

A comparison without rounding must not take such numbers for exact ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from peftfx.analysis.dataflow import names, op_name
from peftfx.bases.dtypes import HALF_DTYPES
from peftfx.export.translation.between_casts import ROUNDS_NUMBERS, rounded
from peftfx.export.translation.layout import SMALL
from peftfx.graph.graph import CONSTANTS, Graph
from peftfx.graph.places import twin
from peftfx.graph.rewriter import Rewriter

#: Operations whose numbers torch rounds to half precision, and ONNX, too.
_ROUNDED = ROUNDS_NUMBERS | names(
    "full full_like new_full fill scalar_tensor masked_fill where clamp clamp_min clamp_max hardtanh"
)
#: Operations that read only the dtype of one operand, and which one it is: its numbers do not matter.
_TYPED = {"type_as": 1, "new_full": 0, "new_ones": 0, "new_zeros": 0}
#: The types of arguments for which a model's code may give a number.
_NUMBERS = ("number", "Optional[number]", "Tensor")


def with_rounded_numbers(graph: Graph) -> Graph:
    """Return a graph whose code's own numbers are rounded to half precision where torch rounds them.

    So are small tables in half precision that are computed from such numbers alone: an export has them as constants.
    """
    copy = graph.clone()
    for node in copy.nodes():
        dtype = _half(node)
        if dtype is None or op_name(node) not in _ROUNDED or not isinstance(node.target, OpOverload):
            continue
        numbers = [str(argument.type) in _NUMBERS for argument in node.target._schema.arguments]
        pairs = zip(node.args, numbers, strict=False)  # the rest have their defaults
        node.args = tuple(rounded(one, dtype) if is_number else one for one, is_number in pairs)
        node.kwargs = {name: rounded(one, dtype) if name == "alpha" else one for name, one in node.kwargs.items()}
    _put_tables(copy)
    return copy


def _half(node: fx.Node) -> torch.dtype | None:
    """Return the dtype in half precision of a result, or of what a comparison reads; None if it is another."""
    value, read = node.meta.get("val"), [operand.meta.get("val") for operand in node.all_input_nodes]
    if not isinstance(value, Tensor):
        return None
    made = [value] if value.is_floating_point() else [one for one in read if isinstance(one, Tensor)]
    return next((one.dtype for one in made if one.dtype in HALF_DTYPES), None)


def _put_tables(graph: Graph) -> None:
    """Compute the tables of a graph as torch does, in place, where half precision rounds them on the way."""
    tables, halved = dict[fx.Node, Tensor](), set[fx.Node]()
    for node in graph.nodes():
        if (value := _table(node, tables)) is not None:
            tables[node] = value
            if value.dtype in HALF_DTYPES or halved.intersection(node.all_input_nodes):
                halved.add(node)
        else:
            for one in _changed(node, tables):
                del tables[one]
                halved.discard(one)
    read = [node for node in halved if any(user not in tables for user in node.users)]
    if not read:
        return
    graph.module.add_module(CONSTANTS, twin(graph.module.get_submodule(CONSTANTS)))  # other graphs share it
    rewriter = Rewriter(graph.module.graph)
    for number, node in enumerate(read):
        name = f"table_{number}"
        graph.module.get_submodule(CONSTANTS).register_buffer(name, tables[node])
        rewriter.replace(node, rewriter.attribute(f"{CONSTANTS}.{name}", node.meta["val"]))
    rewriter.close(graph)


def _table(node: fx.Node, tables: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """Return the value of an operation on tables, or on numbers alone, if it is small enough to be a constant."""
    value = node.meta.get("val")
    if not isinstance(node.target, OpOverload) or not isinstance(value, Tensor) or _written(node):
        return None
    if not all(isinstance(size, int) for size in value.shape) or value.numel() > SMALL:
        return None
    known = {**tables, **_typed(node)}
    if torch.Tag.nondeterministic_seeded in node.target.tags or not all(one in known for one in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda one: known[one])  # type: ignore[misc, arg-type]
    with torch.no_grad():
        made = node.target(*args, **kwargs)
    return made if isinstance(made, Tensor) else None


def _typed(node: fx.Node) -> dict[fx.Node, Tensor]:
    """Return the operand of which an operation reads the dtype alone, with a tensor of that dtype."""
    place = _TYPED.get(op_name(node))
    if place is None:
        return {}
    operand, others = node.args[place], [*node.args[:place], *node.args[place + 1 :]]
    if not isinstance(operand, fx.Node) or operand in others:
        return {}
    return {operand: torch.empty((), dtype=operand.meta["val"].dtype)}


def _changed(node: fx.Node, tables: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
    """Return the tables that an operation changes by writing into one: it, and those that share its memory."""
    written = {tables[one].untyped_storage().data_ptr() for one in _written(node) & tables.keys()}
    return [one for one, table in tables.items() if table.untyped_storage().data_ptr() in written]


def _written(node: fx.Node) -> set[fx.Node]:
    """Return the operands that an operation writes into."""
    if not isinstance(node.target, OpOverload):
        return set()
    given = enumerate(node.target._schema.arguments)
    written = (node.kwargs.get(a.name, [*node.args, *[None] * (i + 1)][i]) for i, a in given if a.is_write)
    return {one for one in written if isinstance(one, fx.Node)}
