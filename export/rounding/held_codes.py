"""A graph with rounded weights, held to the numbers that its codes stand for.

What rounding costs has no tolerance, so a fault in one layer could hide in it. But beside its rounding the graph has to
compute what the captured graph does: torch runs that with the numbers of the codes that were written, one weight at a
time, and ONNX Runtime a twin that does not round activations. The two agree to float precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from peftfx.export.coded.stacks import stack_of
from peftfx.export.metadata import SOURCE
from peftfx.export.verification.comparison import Shown, VerificationError
from peftfx.export.verification.float32_twin import computes_in
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export.verification.verify import verify
from peftfx.export.verification.without_rounding import graph_of
from peftfx.export_options.quantize import BITS, Scheme, parse_schemes
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.lazy_weights import identity
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.codes import Codes, Tabled
from peftfx.quantisation.rounding import Rounded

_NAME = ".exact-activations.onnx"
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
StoredParts = dict[str, Callable[[], Tensor]]
"""Functions that read the tensors of a rounded weight, by what each is."""


@dataclass(frozen=True)
class _Blocks(Codes):
    """Blocks of integers, as `MatMulNBits` reads them.

    Attributes:
        scheme: how the weight is rounded.
        parts: functions that read the blocks, the scales and, unless all are `2^(bits - 1)`, the zeros.
    """

    scheme: Scheme
    parts: StoredParts = field(repr=False, compare=False)

    def dequantise(self) -> Tensor:
        bits, zeros = self.scheme.bits, None
        scales = self.parts["scales"]().view(self.rows, -1)
        integers = _integers(self.parts["blocks"](), bits).view(self.rows, scales.shape[1], -1)
        if "zeros" in self.parts:
            zeros = _integers(self.parts["zeros"]().view(self.rows, -1), bits)[:, : scales.shape[1]]
        return Rounded(integers, scales, zeros).values(self.scheme.middle)[:, : self.columns]


def _integers(packed: Tensor, bits: int) -> Tensor:
    """Return integers of which two of 4 bits are in a byte, along the last axis."""
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def hold_codes(path: Path, program: ir.Model, graph: Graph, calls: Sequence[Tensors], shown: Shown | None) -> str:
    """Compare a saved model with its graph under the numbers that its codes stand for.

    Args:
        path: the model's file.
        program: the program that was written there.
        graph: the graph that it was translated from, with weights in floating point.
        calls: the inputs.
        shown: selects what to compare of an output.

    Returns:
        Why they cannot be compared so; empty if they were.

    Raises:
        VerificationError: they differ by more than floats do.
    """
    written = ir.load(path)
    if any(computes_in(written, kind) for kind in _HALVES):
        return "it computes in half precision"
    parts = _codes_in(written, program)
    sources = {value.meta.get(SOURCE) for value in program.graph.initializers.values()}
    for source, _ in parts:
        if not isinstance(source, str) or stack_of(source) != source:
            return "a constant, or a matrix of a stack, is rounded"
        if source in sources:
            return f"{source.partition('.')[2]} is also read in floating point"
    values = {str(source): _as_read(str(source), by, own, graph, path) for (source, by), own in parts.items()}
    with _exact_activations(path) as twin:
        try:
            reference = graph_of(graph, _by_target(graph, values))
            verify(twin, reference, calls, atol=None, rtol=None, floats_alone=True, shown=shown, on_loose=str)
        except VerificationError as error:
            what = f"beside the rounding of its weights, {error.what}"
            raise VerificationError(what, str(path), error.hint) from error
    return ""


def _codes_in(written: ir.Model, program: ir.Model) -> dict[tuple[object, Scheme], StoredParts]:
    """Return what reads the stored codes of each weight, by where the weight comes from and how it is rounded."""
    found: dict[tuple[object, Scheme], StoredParts] = {}
    for name, value in program.graph.initializers.items():
        made = value.meta.get(SOURCE)
        if isinstance(made, tuple) and isinstance(made[0], tuple):  # codes of a quantised base have another source
            (source, _, text), what = made
            (scheme,) = parse_schemes(text)
            found.setdefault((source, scheme), {})[what] = _read(written.graph.initializers[name])
    return found


def _read(value: ir.Value) -> Callable[[], Tensor]:
    stored = value.const_value
    assert stored is not None
    return lambda: torch.tensor(stored.numpy())  # a copy: what is mapped cannot be written


def _codes(scheme: Scheme, parts: StoredParts, rows: int, columns: int) -> Codes:
    if scheme.kind in BITS:
        return _Blocks(str(scheme), rows, columns, scheme, parts)
    packed, magnitudes = (lambda what=what: parts[what]().flatten() for what in ("codes", "magnitudes"))
    return Tabled(str(scheme), rows, columns, scheme.kind, scheme.block, packed, magnitudes)


def _as_read(source: str, scheme: Scheme, parts: StoredParts, graph: Graph, path: Path) -> Coded:
    """Return the tensor that stands for a rounded weight, in the layout in which the graph reads the weight.

    Raises:
        VerificationError: the codes stand for another weight.
    """
    own = graph.get(source).detach().float()
    first, second = own.shape
    turned = Coded(_codes(scheme, parts, second, first), views=(lambda values: values.T,))
    fits = [made for made in (Coded(_codes(scheme, parts, first, second)), turned) if _fits(made, parts)]
    far = [float((own - made.source).norm()) for made in fits]
    if min(far) > float(own.norm()):
        raise VerificationError(f"the codes of {source.partition('.')[2]} stand for another weight", str(path))
    return fits[far.index(min(far))]


def _fits(made: Coded, parts: StoredParts) -> bool:
    """Return whether blocks of integers have as many rows as a weight [out, in]. A table's codes have no rows."""
    return "blocks" not in parts or len(parts["blocks"]()) == made.codes.rows


def _by_target(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the other values of weights by all targets that read them: a tied weight has several."""
    own = {identity(graph.get(source)): value for source, value in values.items() if source.startswith(f"{BASE}.")}
    read = {str(node.target) for node in graph.nodes() if node.op == "get_attr"}
    tied = {target: own.get(identity(graph.get(target))) for target in read if target.startswith(f"{BASE}.")}
    return {**values, **{target: value for target, value in tied.items() if value is not None}}


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
