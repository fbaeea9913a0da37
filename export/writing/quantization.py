"""quantize: weights of products become blocks of small integers, rounded one at a time as they are written.

ONNX Runtime's `MatMulNBits` reads such a weight: each row is cut into blocks of `block` elements along the axis that
the product sums over, and a block is `scale * (q - 2^(bits - 1))`, q of 4 or 8 bits. The scale is that of the element
of the largest magnitude, sign included, so that this one is exact: round to nearest, without data.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from peftfx.export.metadata import SOURCE
from peftfx.export.translation.layout import value_of
from peftfx.graph.graph import ADAPTERS

DOMAIN = "com.microsoft"
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
FINITE = 1e30  #: the bound on the error where nobody gave one: what is lost depends on the model, and is reported
_ACCURACY = 4  #: activations are rounded to int8 on the fly: several times faster than in float, and what others do
_AT_ONCE = 1 << 22  #: elements that are rounded at a time
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def quantize(model: ir.Model, kind: str, block: int = BLOCK) -> list[str]:
    """Quantise every weight that a product reads whole, in place; returns their names.

    A weight that something else reads too (an embedding tied to the head) stays for that. Adapters that are apart, and
    weights narrower than a block, stay as they are.
    """
    done = []
    for weight in list(model.graph.initializers.values()):
        products = list(_products(weight, block))
        if not products:
            continue
        packed = _Packed(weight, products[0].transposed, BITS[kind], block)
        inputs = packed.initializers(f"{weight.name}.{kind}")
        for value in inputs:
            model.graph.initializers[str(value.name)] = value
        for product in products:
            product.replace(packed, inputs)
        done.append(str(weight.name))
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]
    if done:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return done


@dataclass(frozen=True)
class _Product:
    """A node `x @ W`, or `x @ W.T + b`."""

    node: ir.Node
    transposed: bool  #: whether the weight is stored [out, in]

    def replace(self, packed: _Packed, weight: list[ir.Value]) -> None:
        node, graph = self.node, self.node.graph
        assert graph is not None
        attributes = {
            "K": packed.columns,
            "N": packed.rows,
            "bits": packed.bits,
            "block_size": packed.block,
            "accuracy_level": _ACCURACY,
        }
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], *weight, *([] if bias is None else [None, None, bias])]
        new = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name)
        old, result = node.outputs[0], new.outputs[0]
        result.type, result.shape, result.name = old.type, old.shape, old.name
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _products(weight: ir.Value, block: int) -> Iterator[_Product]:
    """The products that read a weight, all of one layout."""
    if str(weight.name).startswith(f"{ADAPTERS}.") or weight.dtype not in _FLOATS or weight.is_graph_input():
        return
    if weight.shape is None or len(weight.shape) != 2:
        return
    layouts = set()
    for use in weight.uses():
        node, plain = use.node, use.node.attributes.get_int
        if node.op_type == "MatMul" and use.idx == 1:
            transposed = False
        elif node.op_type == "Gemm" and use.idx == 1 and not plain("transA", 0) and _is_linear(node):
            transposed = bool(plain("transB", 0))
        else:
            continue
        if int(str(weight.shape[1 if transposed else 0])) >= block:
            layouts.add(transposed)
            if len(layouts) == 1:
                yield _Product(node, transposed)


def _is_linear(node: ir.Node) -> bool:
    return node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0


class _Packed:
    """A weight in blocks. What is written in two tensors is computed once: one is written after the other."""

    def __init__(self, weight: ir.Value, transposed: bool, bits: int, block: int) -> None:
        assert weight.const_value is not None
        assert weight.shape is not None
        first, second = (int(str(size)) for size in weight.shape)
        self.source, self.transposed, self.bits, self.block = weight, transposed, bits, block
        self.tensor = weight.const_value
        self.rows, self.columns = (first, second) if transposed else (second, first)
        self._waiting: Tensor | None = None  #: the scales of what was packed last

    def initializers(self, name: str) -> list[ir.Value]:
        """The blocks, and their scales."""
        count = -(-self.columns // self.block)
        blob = self.block * self.bits // 8
        kind = self.source.dtype
        assert kind is not None
        return [
            self._value(f"{name}.blocks", ir.DataType.UINT8, (self.rows, count, blob), self._blocks),
            self._value(f"{name}.scales", kind, (self.rows, count), self._scales),
        ]

    def _value(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Tensor]) -> ir.Value:
        tensor = ir.LazyTensor(
            lambda: TorchTensor(read().reshape(shape), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        if SOURCE in self.source.meta:
            value.meta[SOURCE] = (self.source.meta[SOURCE], self.transposed, self.bits, self.block, name)
        return value

    def _blocks(self) -> Tensor:
        blocks, self._waiting = pack(self._weight(), self.bits, self.block)
        return blocks

    def _scales(self) -> Tensor:
        scales, self._waiting = self._waiting, None
        return pack(self._weight(), self.bits, self.block)[1] if scales is None else scales

    def _weight(self) -> Tensor:
        value = value_of(self.tensor)
        return value if self.transposed else value.T


def pack(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Blocks [out, blocks, block * bits / 8] of uint8 and scales [out, blocks] of a weight [out, in]."""
    rows = max(1, _AT_ONCE // weight.shape[1])
    packed = [_pack(some, bits, block) for some in weight.split(rows)]
    return torch.cat([blocks for blocks, _ in packed]), torch.cat([scales for _, scales in packed])


def _pack(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    half = 1 << bits - 1
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block))
    blocks = padded.unflatten(1, (-1, block)).float()
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales = (torch.where(-low > high, low, high) / -half).to(weight.dtype)
    steps = scales.float().unsqueeze(-1)
    integers = torch.where(steps == 0, 0, blocks / steps).round_().add_(half).clamp_(0, 2 * half - 1).to(torch.uint8)
    if bits == 4:
        integers = integers[..., ::2] | integers[..., 1::2] << 4
    return integers, scales


def unpack(blocks: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """The weight [out, in] that blocks and scales stand for."""
    if bits == 4:
        blocks = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = (blocks.to(scales.dtype) - (1 << bits - 1)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, :columns]
