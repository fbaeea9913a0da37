"""Tidy an ONNX model: remove what is unused, and store each weight in the layout that its operators read."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnx_ir.passes import common
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from peftfx.export.metadata import PERM, PERMUTED, PIECES, SCOPE
from peftfx.export.translation.scopes import hand_scope

SMALL = 256  #: the most elements of a folded constant


def tidy(model: ir.Model) -> None:
    """Inline functions, fold small constants, and drop dead code, identities, repeats and the exporter's notes.

    Each node keeps the path of its module. Weights have no value at this point, so nothing that depends on a weight is
    folded. Folding would rename and copy the weight.
    """
    for weight in model.graph.initializers.values():
        weight.const_value = None
    scopes = {node: node.metadata_props[SCOPE] for node in model.graph if SCOPE in node.metadata_props}
    ir.passes.Sequential(common.InlinePass(), common.ClearMetadataAndDocStringPass())(model)
    # onnxscript's pass fails at a split with computed sizes: nothing more is folded then.
    with contextlib.suppress(RuntimeError):
        FoldConstantsPass(shape_inference=False, input_size_limit=SMALL, output_size_limit=SMALL)(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    for node in model.graph:
        if node in scopes:
            node.metadata_props[SCOPE] = scopes[node]


def store_transposed(model: ir.Model) -> None:
    """Remove transposes of weights. ONNX Runtime would fold each into a second copy of the weight.

    A weight that is only read through one permutation is stored permuted, under its own name, with the permutation in
    its metadata. Its MatMul stays a MatMul, which ONNX Runtime's fusions look for. A weight that is also read without a
    permutation (an embedding tied to the head) stays one tensor, and its MatMul becomes a Gemm with `transB`.
    """
    for weight in list(model.graph.initializers.values()):
        readers = [use.node for use in weight.uses()]
        transposes = [node for node in readers if node.op_type == "Transpose" and not node.outputs[0].is_graph_output()]
        perms = {tuple(node.attributes.get_ints("perm", ())) for node in transposes}
        if not transposes or weight.is_graph_input():
            continue
        if len(transposes) == len(readers) and len(perms) == 1 and not weight.is_graph_output():
            _permute(weight, perms.pop() or tuple(reversed(range(len(weight.shape or ())))), transposes)
        else:
            for node in transposes:
                _use_gemm(model.graph, weight, node)


def _permute(weight: ir.Value, perm: tuple[int, ...], transposes: Sequence[ir.Node]) -> None:
    before = weight.const_value
    assert before is not None

    permuted = before.meta.get(PERMUTED)  # permuted before the dtype changes, so that no second copy is in memory

    def read() -> ir.TensorProtocol:
        if permuted is not None:
            return permuted(perm)
        return tensor_adapters.TorchTensor(value_of(before).permute(perm).contiguous(), name=before.name)

    shape = ir.Shape([int(str(before.shape[axis])) for axis in perm])
    lazy = weight.const_value = ir.LazyTensor(read, dtype=before.dtype, shape=shape, name=before.name)
    if PIECES in before.meta:
        lazy.meta[PIECES] = functools.partial(before.meta[PIECES], perm)
    weight.shape = shape
    weight.metadata_props[PERM] = " ".join(map(str, perm))
    for node in transposes:
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        _remove(node)


def value_of(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return the value of an initializer. A lazy initializer is read now."""
    source = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
    return source.raw if isinstance(source, tensor_adapters.TorchTensor) else torch.from_numpy(source.numpy())


def _use_gemm(graph: ir.Graph, weight: ir.Value, transpose: ir.Node) -> None:
    """Replace MatMul(x, Transpose(w)) by Gemm(x, w, transB=1), with the leading axes of x folded into one."""
    shape = weight.shape
    if shape is None or len(shape) != 2:
        return
    for use in list(transpose.outputs[0].uses()):
        matmul, x = use.node, use.node.inputs[0]
        if matmul.op_type != "MatMul" or use.idx != 1 or x is None or x.shape is None or len(x.shape) < 2:
            continue
        nodes = _gemm(x, weight, len(x.shape))
        hand_scope(matmul, nodes)
        graph.insert_before(matmul, nodes)
        old, new = matmul.outputs[0], nodes[-1].outputs[0]
        new.type, new.shape, new.name = old.type, old.shape, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        _remove(matmul)
    if not transpose.outputs[0].uses():
        _remove(transpose)


def _gemm(x: ir.Value, weight: ir.Value, rank: int) -> list[ir.Node]:
    assert weight.shape is not None
    columns, rows = weight.shape[0], weight.shape[1]
    if rank == 2:
        return [ir.node("Gemm", [x, weight], {"transB": 1})]
    flat = _constant([-1, int(str(rows))])
    folded = ir.node("Reshape", [x, flat.outputs[0]])
    folded.outputs[0].type, folded.outputs[0].shape = x.type, ir.Shape([None, int(str(rows))])
    gemm = ir.node("Gemm", [folded.outputs[0], weight], {"transB": 1})
    leading = ir.node("Shape", [x], {"start": 0, "end": rank - 1})
    width = _constant([int(str(columns))])
    full = ir.node("Concat", [leading.outputs[0], width.outputs[0]], {"axis": 0})
    unfolded = ir.node("Reshape", [gemm.outputs[0], full.outputs[0]], {"allowzero": 1})  # an axis may have size 0
    return [flat, folded, gemm, leading, width, full, unfolded]


def _constant(values: list[int]) -> ir.Node:
    return ir.node("Constant", [], {"value_ints": values})


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def name_apart(model: ir.Model) -> None:
    """Rename nodes and inner values so that all names differ. Inputs, outputs and weights keep their names."""
    graph = model.graph
    fixed = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    taken = {value.name for value in fixed}
    nodes: set[str | None] = set()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value not in fixed:
                value.name = _unused(value.name or node.op_type.lower(), taken)
        node.name = _unused(node.name or f"node_{node.op_type}", nodes)


def _unused(name: str, taken: set[str | None]) -> str:
    free = name if name not in taken else next(n for i in itertools.count(1) if (n := f"{name}_{i}") not in taken)
    taken.add(free)
    return free
