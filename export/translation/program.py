"""What both roads to ONNX share: the weights and outputs of a graph, the names of its sizes, torch's exporter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from peftfx.errors import PeftfxError
from peftfx.export.translation.exact_functions import EXACT
from peftfx.export.translation.recurrences import RECURRENCES
from peftfx.export.translation.torchlib import collected_once
from peftfx.graph.graph import DERIVED, Graph, TensorSpec
from peftfx.graph.lazy_weights import identity
from peftfx.graph.rewriter import Cursor, Rewriter

_SYMBOL = re.compile(r"\b[su]\d+\b")


@dataclass(frozen=True)
class Translation:
    """A graph in ONNX, with generated names, and what they stand for.

    Attributes:
        model: its initializers have no values yet.
        targets: for each weight among the initializers, the `get_attr` target in the graph that it stands for.
        axes: for each size symbol, the axis name (or an expression of one) that it stands for.
        outputs: names of the outputs that are tensors.
    """

    model: ir.Model
    targets: Mapping[str, str]
    axes: Mapping[str, str]
    outputs: tuple[str, ...]

    def size(self, text: str) -> str:
        """A size expression of the program in the words of the graph's axes."""
        if (whole := _sorted_sum(text)) in self.axes:
            return self.axes[whole]
        return _sorted_sum(_SYMBOL.sub(lambda match: self.axes.get(match[0], match[0]), text))


def _sorted_sum(text: str) -> str:
    """One spelling of a sum of sizes, whose terms are written in any order."""
    return text if "(" in text else " + ".join(sorted(text.split(" + ")))


def run_exporter(program: ExportedProgram, opset: int | None) -> ir.Model:
    """Translate a program by torch's exporter, without its optimiser: that one copies weights and renames them."""
    table = {**_translations(), **EXACT, **RECURRENCES}
    with collected_once():
        result = torch.onnx.export(
            program, optimize=False, verbose=False, opset_version=opset, custom_translation_table=table
        )
    assert result is not None
    return result.model


def _translations() -> Mapping[Callable[..., object], Callable[..., object]]:
    """transformers' own translations, of operators that torch has none for or wrong ones: experts' grouped products."""
    from transformers.exporters import exporter_onnx

    return getattr(exporter_onnx, "_ONNX_TRANSLATION_TABLE", {})


def onnx_outputs(graph: Graph) -> tuple[str, ...]:
    """Names of the outputs in ONNX, where one cannot be called as an input is."""
    inputs = {spec.name for spec in graph.inputs}
    return tuple(f"{name}.output" if name in inputs else name for name in graph.outputs)


def flatten_outputs(graph: Graph) -> tuple[str, ...]:
    """Leave out outputs that are None and make tensors of plain numbers; returns the names that remain."""
    (output,) = (node for node in graph.nodes() if node.op == "output")
    named = [(n, v) for n, v in zip(onnx_outputs(graph), output.args[0], strict=True) if v is not None]  # type: ignore[arg-type]
    at = Rewriter(graph.module.graph).before(output)
    output.args = (tuple(v if isinstance(v, fx.Node) else _full(at, v) for _, v in named),)
    return tuple(name for name, _ in named)


def _full(at: Cursor, number: fx.node.Argument) -> fx.Node:
    value = torch.full((), cast("float", number), device="meta")
    return at.call(torch.ops.aten.full.default, [], number, value=value)


def weights_of(graph: Graph) -> dict[fx.Node, str]:
    """A generated name for the tensor that each `get_attr` node reads; one name where two read one tensor."""
    names: dict[object, str] = {}
    found: dict[fx.Node, str] = {}
    for node in graph.nodes():
        if node.op == "get_attr" and not isinstance(_attribute(graph, node), nn.Module):
            found[node] = names.setdefault(_identity(graph, str(node.target)), f"w{len(names)}")
    return found


def _attribute(graph: Graph, node: fx.Node) -> object:
    value: object = graph.module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _identity(graph: Graph, target: str) -> object:
    """Equal for two targets that read one tensor: tied weights are stored once."""
    if target.startswith(f"{DERIVED}."):
        return target
    return identity(graph.get(target))


def symbol_axes(specs: Sequence[TensorSpec], values: Sequence[torch.Tensor]) -> dict[str, str]:
    """The axis name that each size symbol of the inputs stands for; solved for where a size is an expression of one."""
    names: dict[str, str] = {}
    for spec, value in zip(specs, values, strict=True):
        for axis, size in zip(spec.shape, value.shape, strict=True):
            if not isinstance(axis, str):
                continue
            if isinstance(size, int):
                raise PeftfxError(f"axis {axis!r} is fixed at {size} by the graph's own code", spec.name, "")
            symbols = size.node.expr.free_symbols
            if len(symbols) > 1:  # an axis that has to be the sum of others: past and sequence
                names.setdefault(_sorted_sum(str(size.node.expr)), axis)
            if len(symbols) == 1:
                (symbol,) = symbols
                (solution,) = sympy.solve(sympy.Symbol(axis, integer=True) - size.node.expr, symbol) or [symbol]
                names.setdefault(str(symbol), axis if solution.is_Symbol else f"({solution})")
    return names
