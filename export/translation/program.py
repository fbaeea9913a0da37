"""What both roads to ONNX share: the weights and outputs of a graph, the names of its sizes, torch's exporter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from peftfx.errors import PeftfxError, warn
from peftfx.export.translation.operators.exact_functions import EXACT
from peftfx.export.translation.operators.grouped_products import GROUPED_PRODUCTS
from peftfx.export.translation.operators.lacking import LACKING
from peftfx.export.translation.operators.placed_rows import PLACED_ROWS
from peftfx.export.translation.operators.promotion import promoted_by_reading
from peftfx.export.translation.operators.recurrences import RECURRENCES
from peftfx.export.translation.operators.recurrent_layers import RECURRENT_LAYERS
from peftfx.export.translation.operators.resizing import RESIZING
from peftfx.export.translation.operators.torchlib import collected_once
from peftfx.graph.contexts import quietly
from peftfx.graph.graph import DERIVED, Graph, TensorSpec
from peftfx.graph.lazy_weights import identity
from peftfx.graph.rewriter import Cursor, Rewriter
from peftfx.graph.trace import forgetting_sizes

_SYMBOL = re.compile(r"\b[su]\d+\b")


@dataclass(frozen=True)
class Translation:
    """A graph in ONNX with generated names, and what the names stand for.

    Attributes:
        model: the ONNX model. Its initializers have no values yet.
        targets: for each initializer that is a weight, its `get_attr` target in the graph.
        axes: for each size symbol, its axis name, or an expression of an axis name.
        outputs: the names of the outputs that are tensors.
    """

    model: ir.Model
    targets: Mapping[str, str]
    axes: Mapping[str, str]
    outputs: tuple[str, ...]

    def size(self, text: str) -> str:
        """Rewrite a size expression of the program with the names of the graph's axes."""
        whole = _sorted_sum(text)
        return self.axes[whole] if whole in self.axes else _sorted_sum(by_axis(text, self.axes))


def by_axis(text: str, axes: Mapping[str, str]) -> str:
    """Return a text with the names of axes in place of the symbols of their sizes."""
    return _SYMBOL.sub(lambda match: axes.get(match[0], match[0]), text)


def _sorted_sum(text: str) -> str:
    """Return one spelling of a sum of sizes, whatever the order of its terms."""
    return text if "(" in text else " + ".join(sorted(text.split(" + ")))


def run_exporter(program: ExportedProgram, opset: int | None) -> ir.Model:
    """Translate a program by torch's exporter without its optimiser, which copies and renames weights."""
    own = (EXACT, GROUPED_PRODUCTS, RECURRENCES, RECURRENT_LAYERS, RESIZING, LACKING, PLACED_ROWS)
    table = {**_translations(), **{target: made for found in own for target, made in found.items()}}
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    with quietly(), collected_once(), promoted_by_reading(), forgetting_sizes(values):
        result = torch.onnx.export(
            program, optimize=False, verbose=False, opset_version=opset, custom_translation_table=table
        )
    assert result is not None
    return result.model


def _translations() -> Mapping[Callable[..., object], Callable[..., object]]:
    """Return transformers' translations of operators that torch lacks or gets wrong: experts' grouped products."""
    from transformers.exporters import exporter_onnx

    return getattr(exporter_onnx, "_ONNX_TRANSLATION_TABLE", {})


def onnx_outputs(graph: Graph) -> tuple[str, ...]:
    """Return the names of the outputs in ONNX. An output with the name of an input gets the suffix `.output`."""
    inputs = {spec.name for spec in graph.inputs}
    return tuple(f"{name}.output" if name in inputs else name for name in graph.outputs)


def values_of_outputs(graph: Graph) -> dict[str, Any]:
    """Return the graph's own value of each output, by its name in ONNX, without outputs that are None, or texts."""
    return {name: value for name, value in _given(graph).items() if not isinstance(value, str | None)}


def _given(graph: Graph) -> dict[str, Any]:
    (output,) = (node for node in graph.nodes() if node.op == "output")
    return dict(zip(onnx_outputs(graph), output.args[0], strict=True))  # type: ignore[arg-type]


def flatten_outputs(graph: Graph) -> tuple[str, ...]:
    """Remove outputs that are None, or texts, and turn plain numbers into tensors. Return the remaining names."""
    (output,) = (node for node in graph.nodes() if node.op == "output")
    values = values_of_outputs(graph)
    if texts := [name for name, value in _given(graph).items() if isinstance(value, str)]:
        warn(f"{', '.join(texts)}: the model returns text here, which is left out: a graph returns tensors and numbers")
    at = Rewriter(graph.module.graph).before(output)
    output.args = (tuple(v if isinstance(v, fx.Node) else _full(at, v) for v in values.values()),)
    return tuple(values)


def _full(at: Cursor, number: fx.node.Argument) -> fx.Node:
    value = torch.full((), cast("float", number), device="meta")
    return at.call(torch.ops.aten.full.default, [], number, value=value)


def weights_of(graph: Graph) -> dict[fx.Node, str]:
    """Return a generated name for the tensor that each `get_attr` node reads. Equal tensors have one name."""
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
    """Return an object that is equal for two targets which read one tensor: tied weights are stored once."""
    if target.startswith(f"{DERIVED}."):
        return target
    return identity(graph.get(target))


def symbol_axes(specs: Sequence[TensorSpec], values: Sequence[torch.Tensor]) -> dict[str, str]:
    """Return the axis name of each size symbol of the inputs. Sizes that are expressions are solved for it."""
    names: dict[str, str] = {}
    for spec, value in zip(specs, values, strict=True):
        for axis, size in zip(spec.shape, value.shape, strict=True):
            if not isinstance(axis, str):
                continue
            if isinstance(size, int):
                raise PeftfxError(f"the translation fixes axis {axis!r} at {size}", spec.name, "report this model")
            symbols = size.node.expr.free_symbols
            if len(symbols) > 1:  # an axis that is the sum of others: past and sequence
                names.setdefault(_sorted_sum(str(size.node.expr)), axis)
            if len(symbols) == 1:
                (symbol,) = symbols
                (solution,) = sympy.solve(sympy.Symbol(axis, integer=True) - size.node.expr, symbol) or [symbol]
                names.setdefault(str(symbol), axis if solution.is_Symbol else f"({solution})")
    return names
