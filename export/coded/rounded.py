"""Round the weights of products to blocks of small integers or to nf4, one at a time, when they are written.

ONNX Runtime's `MatMulNBits` reads the integers. Each row is cut into blocks along the axis that the product sums over.
`MatMulBnb4` reads nf4 in bitsandbytes' own layout. `MatMulNBits` rounds activations to int8, `MatMulBnb4` does not.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.coded.once import Once
from peftfx.export.coded.operators import Product, TableProduct
from peftfx.export.coded.rows import CodedRows, CodedSum, coded_rows, codes_of_bytes, row_nodes
from peftfx.export.coded.stacks import cut_stacks, readers_of, stack_of
from peftfx.export.metadata import SOURCE
from peftfx.export.translation.layout import name_apart, value_of
from peftfx.export.writing.readers import DOMAIN, Lookup, Reader, lookups, readers
from peftfx.export_options.quantize import BITS, Scheme
from peftfx.graph.graph import ADAPTERS
from peftfx.quantisation.codes import Tabled
from peftfx.quantisation.rounding import Rounded, round_blocks, round_table

FINITE = 1e30  #: the bound on the error if none is asked for: the loss depends on the model, and is reported
_ACCURACY = 4  #: activations are rounded to int8 at run time: several times faster than float32, and usual
_UINT8 = ir.DataType.UINT8
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
IN_BFLOAT16 = "it is in bfloat16, and those in float32 and float16 are rounded"  #: why a weight is left out
Choose = Callable[[object], Scheme | None]
"""A function from a weight's source to the scheme that rounds the weight; None leaves it in floating point."""


def quantize(
    model: ir.Model,
    choose: Choose,
    fitted: Mapping[object, Rounded] = MappingProxyType({}),
    multiplied: Collection[object] = (),
) -> dict[str, list[str]]:
    """Round every weight that a product reads whole, in place. Return the weights' names by scheme.

    `fitted` holds weights that GPTQ has rounded already, by their sources. `multiplied` holds the sources of weights
    that another graph multiplies by, stored [out, in]. If this graph only looks up rows of such a weight, it looks them
    up in the codes.

    If rows of a rounded weight are looked up, too (an embedding tied to the head), they are looked up in the codes. If
    another operator reads the weight as well, the weight stays in floating point for that operator. Unmerged adapters,
    and weights narrower than a block, are not rounded.
    """
    cut_stacks(model, lambda source: choose(source) is not None)
    done, looked_up = dict[str, list[str]](), False
    for weight in list(model.graph.initializers.values()):
        source = weight.meta.get(SOURCE)
        scheme = choose(stack_of(source))
        products = [] if scheme is None else list(_products(weight, scheme.block))
        transposed = products[0].transposed if products else source is not None and source in multiplied
        picks = _picks(weight, transposed)
        if scheme is None or not (products or picks) or columns_of(weight, transposed) < scheme.block:
            continue
        product = _product(weight, transposed, scheme, fitted)
        for reader in products:
            reader.replace(product.nodes)
        rows = product.rows() if isinstance(product, IntegerProduct) else coded_rows(product)
        if picks and isinstance(rows, CodedRows):
            looked_up = True
            for lookup in picks:
                lookup.replace(functools.partial(row_nodes, rows))
        for value in product.initializers:
            model.graph.initializers[str(value.name)] = value
        done.setdefault(str(scheme), []).append(str(weight.name))
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]
    if looked_up:
        name_apart(model)
    if done:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return done


def _product(
    weight: ir.Value, transposed: bool, scheme: Scheme, fitted: Mapping[object, Rounded]
) -> TableProduct | IntegerProduct:
    if scheme.kind == "nf4":
        return _tabled(weight, transposed, scheme, by_row=bool(_picks(weight, transposed)))
    return IntegerProduct(weight, transposed, scheme, fitted.get(weight.meta.get(SOURCE)))


def left_out(model: ir.Model, choose: Choose) -> dict[str, str]:
    """Say why weights that were to be rounded are still in floating point, by name. Vectors are not listed."""
    found = {}
    for weight in model.graph.initializers.values():
        scheme, shape = choose(stack_of(weight.meta.get(SOURCE))), weight.shape
        named = isinstance(weight.meta.get(SOURCE), str) and not str(weight.name).startswith(f"{ADAPTERS}.")
        other = weight.dtype not in (*_FLOATS, ir.DataType.BFLOAT16)
        if scheme is None or not named or shape is None or len(shape) < 2 or other:
            continue
        products = list(readers(weight))
        if products and weight.dtype not in _FLOATS:
            found[str(weight.name)] = IN_BFLOAT16
        elif products and len(shape) != 2:
            found[str(weight.name)] = f"a product reads it as a stack of {shape[0]} weights"
        elif products:
            narrow = columns_of(weight, products[0].transposed)
            found[str(weight.name)] = f"its {narrow} columns are fewer than a block of {scheme.block}"
        else:
            who = " and ".join(readers_of(weight)) or "nothing"
            found[str(weight.name)] = f"no product reads it, but {who}"
    return found


def multiplied_in(model: ir.Model) -> set[object]:
    """Return the sources of the weights that products read as [out, in]."""
    return {weight.meta.get(SOURCE) for weight, transposed, _ in roundable(model, 1) if transposed} - {None}


def roundable(model: ir.Model, block: int) -> Iterator[tuple[ir.Value, bool, bool]]:
    """Yield each weight that `quantize` can round, whether it is stored [out, in], and if only products read it."""
    for weight in model.graph.initializers.values():
        products = list(_products(weight, block))
        if products:
            whole = len(products) + len(_picks(weight, products[0].transposed))
            yield weight, products[0].transposed, whole == len(list(weight.uses()))


def rounded_rows(weight: Tensor, scheme: Scheme) -> Tensor:
    """Round rows of a weight [n, in] to blocks of integers, and return the rounded values in float32."""
    options = {"symmetric": scheme.symmetric, "search": scheme.search}
    made = round_blocks(weight, BITS[scheme.kind], scheme.block, **options)
    return made.values(scheme.middle)[:, : weight.shape[1]]


def _products(weight: ir.Value, block: int) -> Iterator[Reader]:
    """Yield the products that read a weight, if they all read one layout."""
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


def _picks(weight: ir.Value, transposed: bool) -> list[Lookup]:
    """Return the lookups of rows of a weight that products read as [out, in]."""
    return list(lookups(weight)) if transposed else []


def _source(weight: ir.Value, transposed: bool, scheme: Scheme) -> object:
    """Return where codes come from: equal for the codes of one weight in two graphs."""
    return weight.meta.get(SOURCE, weight), transposed, str(scheme)


def _tabled(weight: ir.Value, transposed: bool, scheme: Scheme, *, by_row: bool) -> TableProduct:
    if weight.dtype != ir.DataType.FLOAT:
        hint = "leave --dtype out, or quantise to int4"
        raise PeftfxError("the operator for nf4 computes in fp32 only", str(weight.name), hint)
    rows, columns = _size(weight, transposed)
    once = Once(lambda: round_table(read_weight(weight, transposed), "nf4", scheme.block, search=scheme.search), 2)

    def packed() -> Tensor:
        codes = torch.nn.functional.pad(once.take(0)[0], (0, rows * columns % 2))
        return codes[::2] << 4 | codes[1::2]

    codes = Tabled("nf4", rows, columns, "nf4", scheme.block, packed, lambda: once.take(1)[1])
    return TableProduct(str(weight.name), _source(weight, transposed, scheme), codes, by_row=by_row)


class IntegerProduct(Product):
    """A product with blocks of integers of 4 or 8 bits. Activations are rounded to int8 at run time.

    Args:
        weight: the weight to round, float32 or float16.
        transposed: whether the weight is stored [out, in].
        scheme: how the weight is rounded.
        fitted: the rounded blocks, if GPTQ has rounded the weight already.
    """

    def __init__(self, weight: ir.Value, transposed: bool, scheme: Scheme, fitted: Rounded | None) -> None:
        super().__init__(f"{weight.name}.{scheme.kind}", _source(weight, transposed, scheme))
        assert weight.dtype is not None
        self.scheme, self.kind, (self.out, self.columns) = scheme, weight.dtype, _size(weight, transposed)
        self.count = count = -(-self.columns // scheme.block)
        bits, options = scheme.bits, {"symmetric": scheme.symmetric, "search": scheme.search}
        once = Once(
            lambda: fitted or round_blocks(read_weight(weight, transposed), bits, scheme.block, **options),
            2 if scheme.symmetric else 3,
        )
        size = (self.out, count, scheme.block * bits // 8)
        self.blocks = self.constant("blocks", _UINT8, size, lambda: halves(once.take(0).integers, bits))
        self.scales = self.constant("scales", self.kind, (self.out, count), lambda: once.take(1).scales)
        self.zeros = None
        if not scheme.symmetric:
            width = -(-count * bits // 8)
            self.zeros = self.constant(
                "zeros", _UINT8, (self.out, width), lambda: halves(_zeros(once.take(2), bits), bits)
            )

    def nodes(self, x: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
        numbers = {"K": self.columns, "N": self.out, "bits": self.scheme.bits, "block_size": self.scheme.block}
        inputs = [x, self.blocks, self.scales, self.zeros, *([] if bias is None else [None, bias])]
        while inputs[-1] is None:
            inputs.pop()
        return [ir.node("MatMulNBits", inputs, {**numbers, "accuracy_level": _ACCURACY}, domain=DOMAIN)]

    def rows(self) -> CodedRows:
        """Return the weight's rows for lookups."""
        scheme, bits = self.scheme, self.scheme.bits
        part = CodedSum(self.blocks, self.scales, self.zeros, scheme.middle if self.zeros is None else 0)

        def table(middle: int) -> ir.Value:
            made = {value.name: value for value in self.initializers}
            found = made.get(f"{self.name}.bytes{middle}")
            read = functools.partial(_bytes, bits, middle, self.kind)
            return found or self.constant(f"bytes{middle}", self.kind, (256, 8 // bits), read)

        return CodedRows([part], self.count, scheme.block, self.columns, table)


def _bytes(bits: int, middle: int, kind: ir.DataType) -> Tensor:
    return codes_of_bytes(bits, middle).to(torch.float16 if kind == ir.DataType.FLOAT16 else torch.float32)


def _zeros(made: Rounded, bits: int) -> Tensor:
    assert made.zeros is not None
    return torch.nn.functional.pad(made.zeros, (0, made.zeros.shape[1] % 2 if bits == 4 else 0))


def halves(integers: Tensor, bits: int) -> Tensor:
    """Pack integers into bytes: integers of 4 bits become two in a byte, along the last axis."""
    return integers if bits == 8 else integers[..., ::2] | integers[..., 1::2] << 4


def columns_of(weight: ir.Value, transposed: bool) -> int:
    """Return the number of columns of a weight [out, in]."""
    return _size(weight, transposed)[1]


def _size(weight: ir.Value, transposed: bool) -> tuple[int, int]:
    assert weight.shape is not None
    first, second = (int(str(size)) for size in weight.shape)
    return (first, second) if transposed else (second, first)


def read_weight(weight: ir.Value, transposed: bool) -> Tensor:
    """Compute a weight now, and return it as [out, in]."""
    assert weight.const_value is not None
    value = value_of(weight.const_value)
    return value if transposed else value.T
