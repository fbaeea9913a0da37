"""quantize: weights of products are rounded, one at a time as they are written: to blocks of small integers, or to nf4.

ONNX Runtime's `MatMulNBits` reads the integers: each row is cut into blocks along the axis that the product sums over;
`MatMulBnb4` reads nf4 in bitsandbytes' own layout. Activations are rounded to int8 by the first, not by the second.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.coded.operators import TableProduct
from peftfx.export.metadata import SOURCE
from peftfx.export.translation.layout import value_of
from peftfx.export.writing.readers import DOMAIN, Reader, readers
from peftfx.export_options.quantize import BITS, Scheme
from peftfx.graph.graph import ADAPTERS
from peftfx.quantisation.codes import Tabled
from peftfx.quantisation.rounding import Rounded, round_blocks, round_table

FINITE = 1e30  #: the bound on the error where nobody gave one: what is lost depends on the model, and is reported
_ACCURACY = 4  #: activations are rounded to int8 on the fly: several times faster than in float, and what others do
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
Made = TypeVar("Made")
Choose = Callable[[object], Scheme | None]
"""How a weight is rounded, by where it comes from; None leaves it."""


def quantize(model: ir.Model, choose: Choose) -> dict[str, list[str]]:
    """Round every weight that a product reads whole, in place; returns their names by what they were rounded to.

    A weight that something else reads too (an embedding tied to the head) stays for that. Adapters that are apart, and
    weights narrower than a block, stay as they are.
    """
    done: dict[str, list[str]] = {}
    for weight in list(model.graph.initializers.values()):
        scheme = choose(weight.meta.get(SOURCE))
        products = [] if scheme is None else list(_products(weight, scheme.block))
        if scheme is None or not products:
            continue
        make = _tabled if scheme.kind == "nf4" else _packed
        inputs, nodes = make(weight, products[0].transposed, scheme)
        for value in inputs:
            model.graph.initializers[str(value.name)] = value
        for product in products:
            product.replace(nodes)
        done.setdefault(str(scheme), []).append(str(weight.name))
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]
    if done:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return done


def roundable(model: ir.Model, block: int) -> Iterator[tuple[ir.Value, bool, bool]]:
    """The weights that `quantize` can round: each, whether it is stored [out, in], whether only products read it."""
    for weight in model.graph.initializers.values():
        products = list(_products(weight, block))
        if products:
            yield weight, products[0].transposed, len(products) == len(list(weight.uses()))


def rounded_rows(weight: Tensor, scheme: Scheme) -> Tensor:
    """Rows of a weight [n, in] as blocks of integers stand for them, float32."""
    options = {"symmetric": scheme.symmetric, "search": scheme.search}
    made = round_blocks(weight, BITS[scheme.kind], scheme.block, **options)
    zeros = scheme.middle if made.zeros is None else made.zeros.float().unsqueeze(-1)
    values = (made.integers.float() - zeros) * made.scales.float().unsqueeze(-1)
    return values.flatten(1)[:, : weight.shape[1]]


def _products(weight: ir.Value, block: int) -> Iterator[Reader]:
    """The products that read a weight, all of one layout."""
    if str(weight.name).startswith(f"{ADAPTERS}.") or weight.dtype not in _FLOATS or weight.is_graph_input():
        return
    if weight.shape is None or len(weight.shape) != 2 or isinstance(weight.meta.get(SOURCE), tuple):
        return
    layouts = set()
    for reader in readers(weight):
        if int(str(weight.shape[1 if reader.transposed else 0])) >= block:
            layouts.add(reader.transposed)
            if len(layouts) == 1:
                yield reader


Nodes = Callable[[ir.Value, ir.Value | None], Sequence[ir.Node]]


def _tabled(weight: ir.Value, transposed: bool, scheme: Scheme) -> tuple[list[ir.Value], Nodes]:
    if weight.dtype != ir.DataType.FLOAT:
        hint = "leave --dtype out, or quantise to int4"
        raise PeftfxError("the operator that holds nf4 computes in fp32 alone", str(weight.name), hint)
    rows, columns = _size(weight, transposed)
    once = _Once(lambda: round_table(read_weight(weight, transposed), "nf4", scheme.block, search=scheme.search), 2)

    def packed() -> Tensor:
        codes = torch.nn.functional.pad(once.take(0)[0], (0, rows * columns % 2))
        return codes[::2] << 4 | codes[1::2]

    codes = Tabled("nf4", rows, columns, "nf4", scheme.block, packed, lambda: once.take(1)[1])
    product = TableProduct(str(weight.name), (weight.meta.get(SOURCE), transposed, str(scheme)), codes)
    return product.initializers, product.nodes


def _packed(weight: ir.Value, transposed: bool, scheme: Scheme) -> tuple[list[ir.Value], Nodes]:
    bits, block, kind = BITS[scheme.kind], scheme.block, weight.dtype
    assert kind is not None
    rows, columns = _size(weight, transposed)
    options = {"symmetric": scheme.symmetric, "search": scheme.search}
    count = -(-columns // block)
    once = _Once(
        lambda: round_blocks(read_weight(weight, transposed), bits, block, **options), 2 if scheme.symmetric else 3
    )
    parts: list[tuple[str, ir.DataType, tuple[int, ...], Callable[[Rounded], Tensor]]] = [
        ("blocks", ir.DataType.UINT8, (rows, count, block * bits // 8), lambda made: halves(made.integers, bits)),
        ("scales", kind, (rows, count), lambda made: made.scales),
    ]
    if not scheme.symmetric:
        width = -(-count * bits // 8)
        parts.append(("zeros", ir.DataType.UINT8, (rows, width), lambda made: halves(_zeros(made, bits), bits)))
    inputs = []
    for number, (what, dtype, shape, read) in enumerate(parts):
        name = f"{weight.name}.{scheme.kind}.{what}"

        def tensor(
            number: int = number,
            shape: tuple[int, ...] = shape,
            name: str = name,
            read: Callable[[Rounded], Tensor] = read,
        ) -> ir.TensorProtocol:
            return TorchTensor(read(once.take(number)).reshape(shape).contiguous(), name=name)

        lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy)
        if SOURCE in weight.meta:
            value.meta[SOURCE] = (weight.meta[SOURCE], transposed, str(scheme), name)
        inputs.append(value)
    numbers = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": _ACCURACY}
    return inputs, functools.partial(_product, inputs, numbers)


def _product(
    weight: Sequence[ir.Value], numbers: dict[str, int], x: ir.Value, bias: ir.Value | None
) -> Sequence[ir.Node]:
    inputs = [x, *weight, *([] if bias is None else [*([None] * (4 - len(weight))), bias])]
    return [ir.node("MatMulNBits", inputs, numbers, domain=DOMAIN)]


def _zeros(made: Rounded, bits: int) -> Tensor:
    assert made.zeros is not None
    return torch.nn.functional.pad(made.zeros, (0, made.zeros.shape[1] % 2 if bits == 4 else 0))


def halves(integers: Tensor, bits: int) -> Tensor:
    """Bytes of integers: those of 4 bits two in a byte, along the last axis."""
    return integers if bits == 8 else integers[..., ::2] | integers[..., 1::2] << 4


def _size(weight: ir.Value, transposed: bool) -> tuple[int, int]:
    assert weight.shape is not None
    first, second = (int(str(size)) for size in weight.shape)
    return (first, second) if transposed else (second, first)


def read_weight(weight: ir.Value, transposed: bool) -> Tensor:
    """A weight [out, in], computed now."""
    assert weight.const_value is not None
    value = value_of(weight.const_value)
    return value if transposed else value.T


class _Once(Generic[Made]):
    """What is written in several tensors is made once: they are written one after the other."""

    def __init__(self, make: Callable[[], Made], count: int) -> None:
        self.make, self.count = make, count
        self.made: Made | None = None
        self.left: set[int] = set()

    def take(self, number: int) -> Made:
        if self.made is None or number not in self.left:
            self.made, self.left = self.make(), set(range(self.count))
        made = self.made
        self.left.discard(number)
        if not self.left:
            self.made = None
        return made
