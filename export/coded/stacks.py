"""Cut stacks of matrices, as in mixtures of experts: each matrix that a product reads becomes a weight of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from peftfx.export.coded.once import Once
from peftfx.export.metadata import SOURCE
from peftfx.export.translation.layout import value_of

_MARK = "#"  #: separates a stack's source from a matrix's number


def stack_of(source: object) -> object:
    """Return the source of the stack that a matrix was cut from. Any other source is returned unchanged."""
    return source.partition(_MARK)[0] if isinstance(source, str) else source


def number_in(source: object) -> int | None:
    """Return the number of a matrix in the stack that it was cut from. None if it was cut from none."""
    _, mark, number = source.partition(_MARK) if isinstance(source, str) else ("", "", "")
    return int(number) if mark else None


def cut_stacks(model: ir.Model, chosen: Callable[[object], bool]) -> None:
    """Cut stacks [experts, in, out] into matrices if only products read the matrices.

    Args:
        model: its graph is changed. A stack that is cut is removed.
        chosen: says whether to cut a stack, given its source.
    """
    for stack in list(model.graph.initializers.values()):
        if not chosen(stack.meta.get(SOURCE)) or not isinstance(stack.meta.get(SOURCE), str):
            continue
        split = _split(stack)
        if split is None:
            continue
        once = Once(functools.partial(value_of, stack.const_value), len(split.outputs))  # type: ignore[arg-type]
        for number, piece in enumerate(split.outputs):
            for squeeze in [use.node for use in piece.uses()]:
                matrix = _matrix(stack, once, number)
                model.graph.initializers[str(matrix.name)] = matrix
                ir.convenience.replace_all_uses_with(squeeze.outputs[0], matrix)
                model.graph.remove(squeeze, safe=True)
        model.graph.remove(split, safe=True)
        del model.graph.initializers[str(stack.name)]


def _split(stack: ir.Value) -> ir.Node | None:
    """Return the node that cuts a stack into matrices, if nothing else reads the stack and only products the parts."""
    shape, uses = stack.shape, list(stack.uses())
    if shape is None or len(shape) != 3 or len(uses) != 1 or stack.is_graph_input():
        return None
    node = uses[0].node
    if node.op_type != "Split" or node.attributes.get_int("axis", 0) != 0 or len(node.outputs) != int(str(shape[0])):
        return None
    return node if all(_multiplied(piece) for piece in node.outputs) else None


def _multiplied(piece: ir.Value) -> bool:
    for squeeze in (use.node for use in piece.uses()):
        axes = squeeze.inputs[1] if squeeze.op_type == "Squeeze" and len(squeeze.inputs) > 1 else None
        known = None if axes is None else ir.convenience.get_const_tensor(axes)
        if known is None or known.numpy().reshape(-1).tolist() != [0] or squeeze.outputs[0].is_graph_output():
            return False
        if not all(use.node.op_type == "MatMul" and use.idx == 1 for use in squeeze.outputs[0].uses()):
            return False
    return True


def _matrix(stack: ir.Value, once: Once[torch.Tensor], number: int) -> ir.Value:
    assert stack.shape is not None
    assert stack.dtype is not None
    name, shape = f"{stack.name}.{number}", ir.Shape(stack.shape.dims[1:])

    def tensor() -> ir.TensorProtocol:
        return TorchTensor(once.take(number)[number], name=name)

    lazy = ir.LazyTensor(tensor, dtype=stack.dtype, shape=shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(stack.dtype), shape=shape, const_value=lazy)
    value.meta[SOURCE] = f"{stack.meta[SOURCE]}{_MARK}{number}"
    return value


def readers_of(weight: ir.Value) -> Iterator[str]:
    """Yield the operators that read a weight, each operator once."""
    yield from dict.fromkeys(use.node.op_type for use in weight.uses())
