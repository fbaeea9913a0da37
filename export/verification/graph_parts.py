"""The parts of a saved graph: nodes in a row that together read at most so many bytes of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from peftfx.export.writing.direct_read import DirectFile, span_of

_LOOKUPS = ("Gather", "GatherBlockQuantized")  #: operators that read only some rows of their first input
#: The types of weights that are read. Weights of other types, such as those of 4 bits, stay mapped.
_READ = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.BOOL),
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8),
)
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
WIDENED = 16 << 20  #: bytes of a weight that are read before they are cast to float32


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

    @property
    def room(self) -> int:
        """The bytes of memory that this weight takes, cast to float32 if it has 16 bits."""
        return 2 * self.length if self.tensor.data_type in HALVES else self.span

    def read(self, file: DirectFile, memory: memoryview) -> Tensor:
        """Read the weight into `memory`, and return a tensor over this memory."""
        return self._read(file, memory, 0, self.length).view(*self.tensor.dims)

    def read_wide(self, file: DirectFile, memory: memoryview, wider: memoryview) -> Tensor:
        """Read the weight piece by piece into `memory`, cast it to float32 in `wider`, and return a tensor there."""
        flat = torch.frombuffer(wider, dtype=torch.float32, count=math.prod(self.tensor.dims))
        for start in range(0, self.length, WIDENED):
            piece = self._read(file, memory, start, min(WIDENED, self.length - start))
            at = start // piece.itemsize
            flat[at : at + piece.numel()] = piece
        return flat.view(*self.tensor.dims)

    def _read(self, file: DirectFile, memory: memoryview, start: int, length: int) -> Tensor:
        own = file.read_into(memory, self.offset + start, length)
        return torch.frombuffer(own, dtype=to_torch_dtype(ir.DataType(self.tensor.data_type)))


@dataclass(frozen=True)
class ModelPart:
    """Some nodes in a row.

    Attributes:
        nodes: the nodes.
        reads: the names of the values that the nodes read and do not make.
        weights: the weights among them that are read from the file.
        wanted: the names of the values that the nodes make, and that later parts read or the graph returns.
        done: the names of the values that are read here for the last time.
        wide: the types of the weights that are cast to float32 when they are read; see `wide_weights`.
    """

    nodes: Sequence[NodeProto]
    reads: tuple[str, ...]
    weights: tuple[Weight, ...]
    wanted: tuple[str, ...] = ()
    done: frozenset[str] = frozenset()
    wide: Mapping[str, int] = field(default_factory=dict)


def stored_weights(graph: GraphProto, least: int) -> dict[str, Weight]:
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


def cut(
    nodes: Iterable[NodeProto], weights: Mapping[str, Weight], outputs: Sequence[str], limit: int
) -> list[ModelPart]:
    """Cut nodes into parts whose weights take at most `limit` bytes. A larger weight has a part of its own."""
    parts = list(_groups(nodes, weights, limit))
    last = {name: number for number, part in enumerate(parts) for name in part.reads}
    last |= dict.fromkeys(outputs, len(parts))
    found = []
    for number, part in enumerate(parts):
        made = [name for node in part.nodes for name in node.output]
        wanted = tuple(name for name in made if last.get(name, -1) > number)
        found.append(replace(part, wanted=wanted, done=frozenset(n for n in part.reads if last[n] == number)))
    return found


def _groups(nodes: Iterable[NodeProto], weights: Mapping[str, Weight], limit: int) -> Iterator[ModelPart]:
    own: list[NodeProto] = []
    read: dict[str, Weight] = {}
    for node in nodes:
        whole = {name: weights[name] for name in _whole(node) if name in weights}
        if own and whole.keys() - read and sum(weight.room for weight in (read | whole).values()) > limit:
            yield _part(own, read)
            own, read = [], {}
        own.append(node)
        read |= whole
    if own:
        yield _part(own, read)


def _part(nodes: Sequence[NodeProto], weights: Mapping[str, Weight]) -> ModelPart:
    made = {name for node in nodes for name in node.output}
    reads = dict.fromkeys(name for node in nodes for name in reads_of(node) if name not in made)
    return ModelPart(nodes, tuple(reads), tuple(weights.values()))


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
