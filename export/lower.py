"""LoweredProgram: an ExportedProgram that decomposes only the operators that need it, where they stand.

torch.onnx decomposes a program by tracing all of it again, 60% of a conversion's time, for a handful of operators
without a translation of their own. Here each of those is traced alone. A program that writes into tensors in a way
that cannot be undone locally goes torch's way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

Table = Mapping[OpOverload, Callable[..., object]]


class LoweredProgram(ExportedProgram):
    """`program`, with a `run_decompositions` that is local where it can be."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def run_decompositions(
        self, decomp_table: Table | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """This program without the operators in `decomp_table`, and without writes into tensors."""
        writes = [n for n in self.graph.nodes if isinstance(n.target, OpOverload) and n.target._schema.is_mutable]
        if decomp_table is None or not all(map(_is_local, writes)):
            return super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        for node in writes:
            _make_functional(self.graph, node)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (node.target in decomp_table or _is_composite(node.target)):
                _decompose(self.graph, node, decomp_table)
        self.graph.eliminate_dead_code()
        self.graph_module.recompile()
        return self


#: Composite operators that torch always takes apart, so that its tables name them nowhere.
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


def _is_local(write: fx.Node) -> bool:
    """Whether `write` changes one fresh tensor that has no other name yet, and has a form that returns the result."""
    target, kwargs = write.args[0] if write.args else None, write.kwargs
    if _functional_form(write.target) is None or "out" in kwargs or not isinstance(target, fx.Node):
        return False
    if target.op != "call_function" or not isinstance(target.target, OpOverload) or _is_view(target):
        return False
    assert isinstance(write.target, OpOverload)
    changed = [a for a in write.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    dtypes = {n.meta["val"].dtype for n in write.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return len(changed) == 1 and len(floating) <= 1 and not any(map(_is_view, target.users))


def _is_view(node: fx.Node) -> bool:
    """Whether the node's result may share memory with one of its arguments."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return False
    if not isinstance(node.target, OpOverload):
        return True
    # `reshape`, `contiguous`, `to` and the like say nothing in their schema: they are views when they can be.
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    aliases = any(r.alias_info is not None for r in node.target._schema.returns) and not node.target._schema.is_mutable
    return aliases or (composite and node.target not in _FRESH)


_FRESH = {torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.conv2d.default}


def _functional_form(target: object) -> OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`."""
    assert isinstance(target, OpOverload)
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def _make_functional(graph: fx.Graph, write: fx.Node) -> None:
    before, functional = write.args[0], _functional_form(write.target)
    assert isinstance(before, fx.Node)
    assert functional is not None
    write.target = functional
    before.replace_all_uses_with(write, delete_user_cb=lambda user: user > write)


def _decompose(graph: fx.Graph, node: fx.Node, table: Table) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def call(*values: object) -> object:
        rest = iter(values)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, fx.Node) else x for x in leaves], spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    traced = make_fx(call, decomposition_table=dict(table))(*(source.meta["val"] for source in sources))
    inside: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(traced.graph, inside)
    for old, new in inside.items():
        if old.op != "placeholder":
            new.meta = {**node.meta, "val": old.meta["val"]}
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # several results: each user is a getitem
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index, arg-type]
            graph.erase_node(user)
    graph.erase_node(node)
