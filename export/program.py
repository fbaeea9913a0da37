"""trace: a Graph becomes a torch ExportedProgram that holds no weights, only what they look like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import sympy
import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftfx.capturing import isolated
from peftfx.errors import PeftfxError
from peftfx.export.lower import LoweredProgram
from peftfx.export.prepare import prepare
from peftfx.graph import DERIVED, Graph, link

_SYMBOL = re.compile(r"\b[su]\d+\b")
_WEIGHTS = "weights"


@dataclass(frozen=True)
class Program:
    """An exported program, and what its generated names stand for.

    Attributes:
        exported: torch's program; its buffers are fake.
        targets: for each buffer, the `get_attr` target in the graph that it stands for.
        axes: for each size symbol, the axis name (or an expression of one) that it stands for.
        outputs: names of the outputs that are tensors.
    """

    exported: ExportedProgram
    targets: Mapping[str, str]
    axes: Mapping[str, str]
    outputs: tuple[str, ...]

    def size(self, text: str) -> str:
        """A size expression of the program in the words of the graph's axes."""
        return _SYMBOL.sub(lambda match: self.axes.get(match[0], match[0]), text)


def trace(graph: Graph, *, local: bool = True) -> Program:
    """Export `graph` anew, for inference, with fake weights: neither time nor memory depends on their size.

    With `local`, operators without a translation are decomposed one by one (see `LoweredProgram`), else torch's way.

    Raises:
        PeftfxError: the graph was captured in training mode, or a size that should be free is not.
    """
    if graph.training:
        raise PeftfxError(
            "a graph captured in training mode cannot be served", "", "call model.eval() and capture again"
        )
    ready = prepare(graph)
    outputs = _flatten_outputs(ready)
    mode = detect_fake_mode(list(graph.base.parameters())) or FakeTensorMode(shape_env=ShapeEnv())
    targets = _fake_weights(ready, mode)
    with isolated(graph.base), mode, _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        exported = _export(ready, next((p.device for p in graph.base.parameters()), torch.device("cpu")))
    _use_one_mode(exported)
    return Program(LoweredProgram(exported) if local else exported, targets, _name_axes(graph, exported), outputs)


def onnx_outputs(graph: Graph) -> tuple[str, ...]:
    """Names of the outputs in ONNX, where one cannot be called as an input is."""
    inputs = {spec.name for spec in graph.inputs}
    return tuple(f"{name}.output" if name in inputs else name for name in graph.outputs)


def _export(graph: Graph, device: torch.device) -> ExportedProgram:
    examples = []
    for spec in graph.inputs:
        shape = [graph.sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        examples.append(torch.zeros(shape, dtype=spec.dtype, device=device if shape else "cpu"))
    free = tuple({i: Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in graph.inputs)
    return torch.export.export(_Plain(graph.module), tuple(examples), dynamic_shapes=(free,), strict=False)


def _use_one_mode(program: ExportedProgram) -> None:
    """Give weights the fake mode of the rest of the program: torch.export makes a mode of its own for its inputs.

    torch's own decompositions trace the program again, and do not take tensors of two modes.
    """
    places = [n for n in program.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), FakeTensor)]
    used = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    mode = next((n.meta["val"].fake_mode for n in places if n.name in used), None)
    if mode is None:
        return
    with mode:
        for node in places:
            if node.meta["val"].fake_mode is not mode:
                node.meta["val"] = _empty_like(node.meta["val"])
        for name, tensor in program.state_dict.items():
            if isinstance(tensor, FakeTensor) and tensor.fake_mode is not mode:
                program.state_dict[name] = _empty_like(tensor)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class _Plain(nn.Module):
    """A GraphModule behind `*args`, since torch.export reads the parameters' names off the signature."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.module(*tensors))


def _flatten_outputs(graph: Graph) -> tuple[str, ...]:
    """Leave out outputs that are None and make tensors of plain numbers; returns the names that remain."""
    (output,) = (node for node in graph.nodes() if node.op == "output")
    named = [(n, v) for n, v in zip(onnx_outputs(graph), output.args[0], strict=True) if v is not None]  # type: ignore[arg-type]
    with graph.module.graph.inserting_before(output):
        values = [
            v if isinstance(v, fx.Node) else graph.module.graph.call_function(torch.ops.aten.full.default, ([], v))
            for _, v in named
        ]
    output.args = (tuple(values),)
    return tuple(name for name, _ in named)


def _fake_weights(graph: Graph, mode: FakeTensorMode) -> dict[str, str]:
    """Point the graph's `get_attr` nodes at fake buffers, one for each distinct tensor; returns what they stand for."""
    holder, targets = nn.Module(), dict[str, str]()
    seen: dict[object, str] = {}
    for node in graph.nodes():
        if node.op != "get_attr" or isinstance(_attribute(graph, node), nn.Module):
            continue
        target = str(node.target)
        like = _looks(graph, node)
        key = _identity(graph, target)
        if key not in seen:
            seen[key] = f"w{len(seen)}"
            with mode:
                fake = torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)
            holder.register_buffer(seen[key], fake)
            targets[f"module.{_WEIGHTS}.{seen[key]}"] = target
        node.target = f"{_WEIGHTS}.{seen[key]}"
    kept = {name: child for name, child in graph.module.named_children() if name == "constants"}
    graph.module = link(graph.module.graph, {_WEIGHTS: holder, **{n: c for n, c in kept.items() if _has_modules(c)}})
    return targets


def _has_modules(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _attribute(graph: Graph, node: fx.Node) -> object:
    value: object = graph.module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _looks(graph: Graph, node: fx.Node) -> torch.Tensor:
    """A tensor with the shape and dtype of what a `get_attr` node reads, which need not exist yet."""
    target = str(node.target)
    if target.startswith(f"{DERIVED}.") and isinstance(node.meta.get("val"), torch.Tensor):
        return cast("torch.Tensor", node.meta["val"])
    return graph.get(target)


def _identity(graph: Graph, target: str) -> object:
    """Equal for two targets that read one tensor: tied weights are stored once."""
    if target.startswith(f"{DERIVED}."):
        return target
    tensor = graph.get(target)
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _name_axes(graph: Graph, exported: ExportedProgram) -> dict[str, str]:
    """The axis name that each size symbol stands for; solved for where the size is an expression of one."""
    names: dict[str, str] = {}
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec, user in zip(graph.inputs, exported.graph_signature.user_inputs, strict=True):
        for axis, size in zip(spec.shape, placeholders[str(user)].meta["val"].shape, strict=True):
            if not isinstance(axis, str):
                continue
            if isinstance(size, int):
                raise PeftfxError(f"axis {axis!r} is fixed at {size} by the graph's own code", spec.name, "")
            symbols = size.node.expr.free_symbols
            if len(symbols) == 1:
                (symbol,) = symbols
                (solution,) = sympy.solve(sympy.Symbol(axis, integer=True) - size.node.expr, symbol) or [symbol]
                names.setdefault(str(symbol), axis if solution.is_Symbol else f"({solution})")
    return names
