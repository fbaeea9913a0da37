"""torch's own road to ONNX: export the graph again, and decompose it whole. Slow; the oracle for the fast road."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftfx.errors import PeftfxError
from peftfx.export.translation.preparation import prepare
from peftfx.export.translation.program import (
    Translation,
    by_axis,
    flatten_outputs,
    run_exporter,
    symbol_axes,
    weights_of,
)
from peftfx.export.translation.scopes import adopt_scopes
from peftfx.graph.contexts import isolated
from peftfx.graph.graph import Graph
from peftfx.graph.linking import link
from peftfx.graph.rewriter import Rewriter
from peftfx.graph.trace import asked_of_sizes, splits

_WEIGHTS = "weights"


def retrace(graph: Graph, opset: int | None) -> Translation:
    """Translate `graph`, captured in eval mode, with fake weights, so that their size costs no time or memory."""
    ready = prepare(graph)
    outputs = flatten_outputs(ready)
    mode = detect_fake_mode(list(graph.base.parameters())) or FakeTensorMode(shape_env=ShapeEnv())
    targets = _fake_weights(ready, mode)
    with isolated(graph.base):
        with mode, _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = _export(ready, next((p.device for p in graph.base.parameters()), torch.device("cpu")))
        _use_one_mode(program)
        places = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        axes = symbol_axes(graph.inputs, [places[str(name)] for name in program.graph_signature.user_inputs])
        with asked_of_sizes(list(places.values())) as asked:
            model = run_exporter(program, opset)
        if (where := splits(asked, axes)) is not None:
            what = f"torch's translation would be right only where {by_axis(str(where), axes)}"
            raise PeftfxError(what, type(graph.base).__name__, "write what depends on that size in another way")
        adopt_scopes(model)
        return Translation(model, targets, axes, outputs)


def _export(graph: Graph, device: torch.device) -> ExportedProgram:
    examples = []
    for spec in graph.inputs:
        shape = [graph.sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        examples.append(torch.zeros(shape, dtype=spec.dtype, device=device if shape else "cpu"))
    free = tuple({i: Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in graph.inputs)
    return torch.export.export(_Plain(graph.module), tuple(examples), dynamic_shapes=(free,), strict=False)


def _use_one_mode(program: ExportedProgram) -> None:
    """Give weights the fake mode of the rest of the program, as torch.export makes its own mode for its inputs.

    torch's own decompositions trace the program again, and refuse tensors of two modes.
    """
    places = [n for n in program.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), FakeTensor)]
    used = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    mode = next((n.meta["val"].fake_mode for n in places if n.name in used), None)
    if mode is None:
        return
    rewriter = Rewriter(program.graph)
    with mode:
        for node in places:
            if node.meta["val"].fake_mode is not mode:
                rewriter.revalue(node, _empty_like(node.meta["val"]))
        for name, tensor in program.state_dict.items():
            if isinstance(tensor, FakeTensor) and tensor.fake_mode is not mode:
                program.state_dict[name] = _empty_like(tensor)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class _Plain(nn.Module):
    """A GraphModule called with `*args`, because torch.export reads parameter names off the signature.

    It runs node by node, so that each node keeps the modules that ran it when the graph was captured.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with fx.traceback.preserve_node_meta():
            return tuple(fx.Interpreter(self.module).run(*tensors))


def _fake_weights(graph: Graph, mode: FakeTensorMode) -> dict[str, str]:
    """Point `get_attr` nodes at fake buffers, one for each distinct tensor. Return the buffers' targets."""
    holder, targets = nn.Module(), dict[str, str]()
    for node, name in weights_of(graph).items():
        if name not in holder._buffers:
            with mode:
                holder.register_buffer(name, _empty_like(node.meta["val"]))
            targets[f"module.{_WEIGHTS}.{name}"] = str(node.target)
        node.target = f"{_WEIGHTS}.{name}"
    kept = {n: c for n, c in graph.module.named_children() if n == "constants" and any(True for _ in c.children())}
    graph.module = link(graph.module.graph, {_WEIGHTS: holder, **kept})
    return targets
