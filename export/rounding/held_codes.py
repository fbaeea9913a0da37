"""A graph with rounded weights, held to the numbers that its codes stand for.

What rounding costs has no tolerance, so a fault in one layer could hide in it. But beside its rounding the graph has to
compute what the captured graph does: torch runs that with the numbers of the codes that were written, one weight at a
time, and ONNX Runtime a twin that does not round activations. The two agree to float precision. And the numbers have to
be as near to their weights as rounding leaves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import Tensor

from peftfx.export.metadata import SOURCE
from peftfx.export.rounding.before_rounding import hold_graph
from peftfx.export.rounding.stored_codes import rounded_weights
from peftfx.export.verification.comparison import Comparison, Reference, Shown, VerificationError
from peftfx.export.verification.float32_twin import computes_in
from peftfx.export.verification.sizes.axes import axes_in
from peftfx.export.verification.tolerances.rounded_numbers import with_rounded_numbers
from peftfx.export.verification.tolerances.sigmoids import made_by_sigmoids
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export.verification.verify import unpadded, verify
from peftfx.export.verification.without_rounding import CodeAndGraph, graph_of, hold_without_rounding
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.lazy_weights import identity
from peftfx.graph.recipe import Get

_NAME = ".exact-activations.onnx"
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class HeldGraph:
    """A written graph with rounded weights, and what it is held to.

    Attributes:
        path: the model's file.
        program: the program that was written there.
        graph: the graph that it was translated from, with weights in floating point.
        captured: the model's own code, and its graph as captured.
        calls: the inputs.
        shown: selects what to compare of an output.
        found: the comparisons of the model with its rounding.
        small: whether the model is small enough to run in float64.
    """

    path: Path
    program: ir.Model
    graph: Graph
    captured: CodeAndGraph
    calls: Sequence[Tensors]
    shown: Shown | None
    found: Sequence[Comparison]
    small: bool

    def hold(self) -> str:
        """Compare the model with its graph under the numbers that its codes stand for.

        Return why they cannot be compared so; empty if they were.

        Raises:
            VerificationError: they differ by more than floats do, or codes are too far from their weights.
        """
        written = ir.load(self.path)
        values, unnamed = self._values(written)
        half = any(computes_in(written, kind) for kind in _HALVES)
        if not half:
            shown = self.shown or functools.partial(unpadded, axes_in(self.path))
            for call in self.calls:
                hold_graph(self.captured, call, shown, str(self.path))
        sources = {value.meta.get(SOURCE) for value in self.program.graph.initializers.values()}
        if unnamed:
            return "a constant is rounded"
        if twice := next((source for source in values if source in sources), None):
            return f"{twice.partition('.')[2]} is also read in floating point"
        if half and not self.small:
            return "it computes in half precision, and is too large to run in float64"
        read = _reading(self.graph, values)
        try:
            with _exact_activations(self.path) as twin:
                if half:
                    return self._hold_half(twin, graph_of(with_rounded_numbers(self.graph), read))
                reference = graph_of(self.graph, read)
                options = {"atol": None, "rtol": None, "floats_alone": True, "shown": self.shown, "on_loose": str}
                verify(twin, reference, self.calls, **options)  # type: ignore[arg-type]
        except VerificationError as error:
            what = f"apart from the rounding of its weights, {error.what}"
            raise VerificationError(what, str(self.path), error.hint) from error
        return ""

    def _hold_half(self, twin: Path, reference: Reference) -> str:
        hold = functools.partial(
            hold_without_rounding,
            *(twin, self.captured, reference),
            compared_as_is=self.found,
            shown=self.shown,
            sigmoids=made_by_sigmoids(self.graph),
        )
        return "" if all(hold(call=call) for call in self.calls) else "it does not run in float64"

    def _values(self, written: ir.Model) -> tuple[dict[str, Callable[[], Tensor]], bool]:
        """Return what stands for each rounded tensor, and whether a rounded one has no name in the graph."""
        found: dict[str, dict[int | None, Tensor]] = {}
        unnamed = False
        for weight in rounded_weights(written, self.program):
            if weight.source:
                made = weight.as_read(weight.own(self.graph.get), str(self.path))
                found.setdefault(weight.source, {})[weight.number] = made
            unnamed |= not weight.source
        return {
            source: functools.partial(_whole, self.graph.get, source, own) for source, own in found.items()
        }, unnamed


def _whole(get: Get, source: str, own: Mapping[int | None, Tensor]) -> Tensor:
    """Return a tensor whose numbers are those of its codes, or whose matrices are, if it is a stack of them."""
    if None in own:
        return own[None]
    stack = get(source).detach().float().clone()
    for number, matrix in own.items():
        stack[number] = matrix
    return stack


def _reading(graph: Graph, values: Mapping[str, Callable[[], Tensor]]) -> Get:
    """Return a function that reads weights, and the values in place of some by all their targets, if they are tied."""
    own = {identity(graph.get(source)): source for source in values if source.startswith(f"{BASE}.")}

    def read(target: str) -> Tensor:
        if target not in values and target.startswith(f"{BASE}."):
            target = own.get(identity(graph.get(target)), target)
        return values[target]() if target in values else graph.get(target)

    return read


@contextmanager
def _exact_activations(path: Path) -> Iterator[Path]:
    """Yield a copy of a saved model, over the same weights, whose products round no activations."""
    proto = onnx.load(path, load_external_data=False)
    for node in _nodes(proto.graph):
        if node.op_type == "MatMulNBits":
            level = next((a for a in node.attribute if a.name == "accuracy_level"), None)
            if level is not None:
                level.i = 0
    copy = path.with_name(_NAME)
    try:
        onnx.save(proto, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _nodes(inner)
