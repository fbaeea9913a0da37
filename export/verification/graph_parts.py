"""The parts of a saved graph: nodes in a row that together read at most so many bytes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_ir.tensor_adapters import to_torch_dtype

from peftfx.export.writing.direct_read import DirectFile, span_of
from peftfx.serving.onnx_model import to_ort

_LOOKUPS = ("Gather", "GatherBlockQuantized")  #: operators that read only some rows of their first input
#: The types of weights that are read. Weights of other types, such as those of 4 bits, stay mapped.
_READ = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.BOOL),
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8),
)


@dataclass(frozen=True)
class Weight:
    """A weight in a data file."""

    tensor: TensorProto
    file: str
    offset: int
    length: int

    @property
    def span(self) -> int:
        """The bytes of the whole pages that have this weight."""
        return span_of(self.offset, self.length)

    def read(self, file: DirectFile, memory: memoryview) -> ort.OrtValue:
        """Read the weight into `memory`, and return a value that uses this memory."""
        own = file.read_into(memory, self.offset, self.length)
        flat = torch.frombuffer(own, dtype=to_torch_dtype(ir.DataType(self.tensor.data_type)))
        return to_ort(flat.view(*self.tensor.dims))


@dataclass(frozen=True)
class Part:
    """Some nodes in a row.

    Attributes:
        nodes: the nodes.
        reads: the names of the values that the nodes read and do not make.
        weights: the weights among them that are read from the file.
    """

    nodes: Sequence[NodeProto]
    reads: tuple[str, ...]
    weights: tuple[Weight, ...]

    @property
    def makes(self) -> list[str]:
        """The names of the values that the nodes make."""
        return [name for node in self.nodes for name in node.output if name]

    @property
    def span(self) -> int:
        """The bytes of memory that the weights need."""
        return sum(weight.span for weight in self.weights)


def weights_of(graph: GraphProto, least: int) -> dict[str, Weight]:
    """Return the weights in data files that can be read into memory, from `least` bytes on, by name."""
    found = {}
    for tensor in graph.initializer:
        if uses_external_data(tensor) and tensor.data_type in _READ:
            info = ExternalDataInfo(tensor)
            weight = Weight(tensor, info.location, int(info.offset or 0), int(info.length or 0))
            aligned = weight.offset % ir.DataType(tensor.data_type).itemsize == 0
            if aligned and weight.length >= max(least, 1):
                found[tensor.name] = weight
    return found


def cut(nodes: Iterable[NodeProto], weights: Mapping[str, Weight], limit: int) -> Iterator[Part]:
    """Cut nodes into parts that read at most `limit` bytes of weights. A larger weight has a part of its own."""
    own: list[NodeProto] = []
    read: dict[str, Weight] = {}
    for node in nodes:
        new = {name: weights[name] for name in _whole(node) if name in weights and name not in read}
        if own and new and sum(weight.span for weight in (*read.values(), *new.values())) > limit:
            yield _part(own, read)
            own, read = [], {name: weights[name] for name in _whole(node) if name in weights}
            new = {}
        own.append(node)
        read |= new
    if own:
        yield _part(own, read)


def _part(nodes: Sequence[NodeProto], weights: Mapping[str, Weight]) -> Part:
    made = {name for node in nodes for name in node.output}
    reads = dict.fromkeys(name for node in nodes for name in reads_of(node) if name not in made)
    return Part(nodes, tuple(reads), tuple(weights.values()))


def _whole(node: NodeProto) -> list[str]:
    """Return the names of the values that a node reads, without a table of which it reads only some rows."""
    reads = reads_of(node)
    return reads[1:] if node.op_type in _LOOKUPS else reads


def reads_of(node: NodeProto) -> list[str]:
    """Return the names of the values that a node reads, and that graphs in its attributes read from outside."""
    graphs = [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
    graphs += [graph for attribute in node.attribute for graph in attribute.graphs]
    return [*(name for name in node.input if name), *(name for graph in graphs for name in _outside(graph))]


def _outside(graph: GraphProto) -> Iterator[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)} | {o for n in graph.node for o in n.output}
    for name in (*(name for node in graph.node for name in reads_of(node)), *(value.name for value in graph.output)):
        if name not in own:
            yield name
