"""Replace products with quantised weights of the base by operators that hold these weights' codes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from peftfx.export.coded.operators import Product, least_opset, product_for
from peftfx.export.coded.rows import OPERATOR, REASON, CodedRows, coded_rows, row_nodes
from peftfx.export.metadata import PERM, SOURCE
from peftfx.export.translation.layout import name_apart
from peftfx.export.writing.readers import DOMAIN, Reader, lookups, readers
from peftfx.graph.graph import BASE, Graph
from peftfx.passes.optimization.fuse import OPSET
from peftfx.quantisation.coded import Coded

FLOAT = "float32"
_USUAL = 20  #: the version that torch's exporter prefers


@dataclass(frozen=True)
class Choice:
    """The way in which some weights of the base are written, and the reason.

    Attributes:
        format: the format of their codes.
        operator: the operator that holds the codes, or `float32`.
        reason: why this operator.
        weights: their names.
    """

    format: str
    operator: str
    reason: str
    weights: list[str] = field(default_factory=list, compare=False)

    def __str__(self) -> str:
        return f"{len(self.weights)} of {self.format} in {self.operator}"


def place_codes(model: ir.Model, graph: Graph) -> list[Choice]:
    """Replace weights by the codes that they stand for. Return what was chosen for which weights.

    For an embedding, rows of codes are gathered and then dequantised. If another operator reads a weight, a float32
    copy stays for it, dequantised when it is written. Merged weights are not the base's, and are left alone.
    """
    chosen: dict[Choice, Choice] = {}
    for weight in list(model.graph.initializers.values()):
        coded = _coded(weight, graph)
        if coded is None:
            continue
        for choice in _placed(model, weight, coded):
            found = chosen.setdefault(choice, choice)
            found.weights.append(str(weight.name))
    if chosen:
        name_apart(model)
    if any(choice.operator.startswith("MatMul") for choice in chosen):
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return list(chosen.values())


def opset_for(graph: Graph) -> int | None:
    """Return the version of ONNX's operators that a graph's codes ask for, or None if the usual one has them all."""
    names = {str(node.target) for node in graph.nodes() if node.op == "get_attr"}
    read = (graph.get(name) for name in names if name.startswith(f"{BASE}."))
    asked = any(isinstance(tensor, Coded) and least_opset(tensor.codes) > _USUAL for tensor in read)
    return OPSET if asked else None


def _coded(weight: ir.Value, graph: Graph) -> Coded | None:
    source = weight.meta.get(SOURCE)
    if not isinstance(source, str) or not source.startswith(f"{BASE}.") or weight.is_graph_input():
        return None
    tensor = graph.get(source)
    return tensor if isinstance(tensor, Coded) else None


def _placed(model: ir.Model, weight: ir.Value, coded: Coded) -> Iterator[Choice]:
    """Replace the readers of a weight that can be replaced, and yield how the weight is written."""
    codes, why = coded.codes, "something else than a product or a lookup reads it"
    found = [reader for reader in readers(weight) if _fits(reader, weight, coded)]
    picks = [lookup for lookup in lookups(weight) if coded.transposed is False and PERM not in weight.metadata_props]
    if weight.dtype != ir.DataType.FLOAT:
        found, picks, why = [], [], "its operator is of float32 alone"
    if found or picks:
        made = product_for(
            codes, str(weight.name), weight.meta[SOURCE], model.graph.opset_imports[""], by_row=bool(picks)
        )
        if isinstance(made, Product):
            for reader in found:
                reader.replace(made.nodes)
            if found:
                yield Choice(codes.format, made.operator, made.reason)
            rows = coded_rows(made)
            if picks and isinstance(rows, CodedRows):
                for lookup in picks:
                    lookup.replace(functools.partial(row_nodes, rows))
                yield Choice(codes.format, OPERATOR, REASON)
            why = rows if picks and isinstance(rows, str) else why
            if found or (picks and isinstance(rows, CodedRows)):
                for value in made.initializers:
                    model.graph.initializers[str(value.name)] = value
        else:
            why = made
    if weight.uses():
        yield Choice(codes.format, FLOAT, why)
    else:
        del model.graph.initializers[str(weight.name)]


def _fits(reader: Reader, weight: ir.Value, coded: Coded) -> bool:
    """Say whether a reader multiplies by the transpose of the codes' matrix [out, in]."""
    if coded.transposed is None or reader.x.shape is None:
        return False
    turns = [coded.transposed, weight.metadata_props.get(PERM) == "1 0", reader.transposed]
    return sum(turns) % 2 == 1
