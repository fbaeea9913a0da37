"""Decompose operators that torch's exporter cannot translate, one by one, in place.

torch.onnx decomposes a program by tracing the whole program again. A `LoweredProgram` traces only the operators that
need it, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from peftfx.graph.rewriter import Rewriter, distinct_tensors
from peftfx.graph.trace import asked_of_sizes, splits
from peftfx.passes.optimization.functional import make_functional

Table = Mapping[OpOverload, Callable[..., object]]


class Uncovered(Exception):
    """Raised when the fast road cannot translate a graph. The text says why."""


class LoweredProgram(ExportedProgram):
    """A program whose `run_decompositions` decomposes operators in place."""

    def run_decompositions(
        self, decomp_table: Table | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """Remove the operators in `decomp_table` from this program."""
        table = decomp_table or {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (node.target in table or _is_composite(node.target)):
                _decompose(self.graph, node, table)
        _drop_relabels(self.graph)
        self.graph.eliminate_dead_code()
        self.graph_module.recompile()
        return self

    @property  # type: ignore[misc]  # torch's setter only raises
    def graph_signature(self) -> ExportGraphSignature:
        """The signature, with the outputs that the graph has now: torch's type promotion casts some of them anew."""
        signature = super().graph_signature
        (output,) = self.graph.find_nodes(op="output")
        signature.output_specs[:] = _results(output.args[0])
        return signature


def _drop_relabels(graph: fx.Graph) -> None:
    """Remove writes that only change strides of axes of size 1, as in torch's pooling: no element moves."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided_.default):
        tensor, *layout = node.args[:3]
        sizes, strides = ([s.meta["val"] if isinstance(s, fx.Node) else s for s in given] for given in layout)
        value = tensor.meta["val"]
        kept = [axis for axis, size in enumerate(value.shape) if size != 1]
        same = all(str(strides[axis]) == str(value.stride(axis)) for axis in kept)
        if same and list(map(str, sizes)) == list(map(str, value.shape)):
            node.replace_all_uses_with(tensor)
            graph.erase_node(node)


def lowered_program(graph: fx.Graph, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> LoweredProgram:
    """Make a program of a graph that reads only its inputs, and does not write to them."""
    places = [InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in inputs]
    _, in_spec = pytree.tree_flatten(((0,) * len(inputs), {}))
    _, out_spec = pytree.tree_flatten((0,) * len(outputs))
    return LoweredProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(places, _results(outputs)),
        state_dict={},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))],
        constants={},
    )


def _results(outputs: Sequence[fx.Node]) -> list[OutputSpec]:
    return [OutputSpec(OutputKind.USER_OUTPUT, _argument(node), None) for node in outputs]


def _argument(node: fx.Node) -> TensorArgument | SymIntArgument | SymFloatArgument | SymBoolArgument:
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return SymIntArgument(node.name)
    if isinstance(value, torch.SymFloat):
        return SymFloatArgument(node.name)
    return SymBoolArgument(node.name) if isinstance(value, torch.SymBool) else TensorArgument(node.name)


#: Composite operators that torch always decomposes, and therefore does not list in its tables.
_COMPOSITE = frozenset(
    [
        "adjoint",
        "batch_norm",
        "chunk",
        "coalesce",
        "hsplit",
        "mH",
        "mT",
        "matrix_H",
        "moveaxis",
        "movedim",
        "narrow",
        "numpy_T",
        "positive",
        "ravel",
        "reshape_as",
        "swapaxes",
        "swapdims",
        "tensor_split",
        "unsafe_chunk",
        "vsplit",
    ]
)


def _is_composite(target: object) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "aten" and target._opname in _COMPOSITE


def _decompose(graph: fx.Graph, node: fx.Node, table: Table) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def call(*values: object) -> object:
        rest = iter(values)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, fx.Node) else x for x in leaves], spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = distinct_tensors([source.meta["val"] for source in sources])
    # Tensors that a decomposition makes are fake too, also where the operator reads none: a unit matrix.
    with detect_fake_mode([*values, node.meta.get("val")]) or nullcontext(), asked_of_sizes(values) as asked:
        traced = make_fx(call, decomposition_table=dict(table))(*values)
    if (where := splits(asked)) is not None:  # the nodes would be those of the example's sizes
        raise Uncovered(f"{node.target}, which is split up by a branch on a size: {where}")
    make_functional(Rewriter(traced.graph))  # torch's decompositions write into their own intermediate results
    result = Rewriter(graph).before(node).splice(traced, sources)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # several results: each user is a getitem
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
