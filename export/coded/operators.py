"""Operators that compute `x @ W.T` in ONNX Runtime from the codes of W, and the initializers that hold the codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from peftfx.export.coded.grid import GRID_BITS, MIDDLE, Grid
from peftfx.export.metadata import SOURCE
from peftfx.export.writing.readers import DOMAIN
from peftfx.quantisation.codes import Blocks, Codes, Floats8, Tabled

_UINT8, _FLOAT, _INT64 = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.INT64
_LARGEST_TABLE_BLOCK = 256  #: of `MatMulBnb4`: a larger block is cut, and its magnitude repeated
_EXACT = 0  #: the accuracy level that keeps activations in float32


@dataclass
class Product(ABC):
    """The operator and initializers that replace a weight in its products.

    Attributes:
        name: the name of the weight.
        source: where the weight comes from: `SOURCE` in its value's meta.
        initializers: the initializers that the graph needs.
    """

    name: str
    source: object
    initializers: list[ir.Value] = field(default_factory=list)

    #: What reports say: the operator, and why this one.
    operator = ""
    reason = ""

    @abstractmethod
    def nodes(self, x: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
        """Make the nodes of one product of `x` with the weight, plus `bias`. The last node has the result."""

    def constant(self, what: str, kind: ir.DataType, shape: tuple[int, ...], read: Callable[[], Tensor]) -> ir.Value:
        """Add an initializer that is computed when it is written."""
        name = f"{self.name}.{what}"

        def tensor() -> ir.TensorProtocol:
            return TorchTensor(read().reshape(shape).contiguous(), name=name)

        lazy = ir.LazyTensor(tensor, dtype=kind, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=lazy)
        value.meta[SOURCE] = (self.source, what)
        self.initializers.append(value)
        return value


class TableProduct(Product):
    """A product with bitsandbytes' codes, whose bytes are unchanged.

    Attributes:
        by_row: whether its tensors have an axis of rows. This is asked for if rows are picked, and possible if no two
            rows share a byte or a magnitude.
    """

    operator = "MatMulBnb4"
    reason = "it reads bitsandbytes' own bytes and magnitudes"

    def __init__(self, name: str, source: object, codes: Tabled, *, by_row: bool = False) -> None:
        super().__init__(name, source)
        self.codes, self.block = codes, min(codes.block, _LARGEST_TABLE_BLOCK)
        self.by_row = by_row and codes.columns % self.block == 0
        count = codes.rows * codes.columns
        repeats, blocks = codes.block // self.block, -(-count // self.block)
        size, blocked = (-(-count // 2),), (blocks,)
        if self.by_row:  # lookups of rows read these tensors, too; the operator ignores their shapes
            size, blocked = (codes.rows, codes.columns // 2), (codes.rows, codes.columns // self.block)  # type: ignore[assignment]
        self.packed = self.constant("codes", _UINT8, size, codes.packed)
        self.magnitudes = self.constant(
            *("magnitudes", _FLOAT, blocked), lambda: codes.magnitudes().repeat_interleave(repeats)[:blocks]
        )

    def nodes(self, x: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
        kind = {"fp4": 0, "nf4": 1}[self.codes.table]
        told = {"K": self.codes.columns, "N": self.codes.rows, "block_size": self.block, "quant_type": kind}
        product = ir.node("MatMulBnb4", [x, self.packed, self.magnitudes], told, domain=DOMAIN)
        return [product] if bias is None else [product, ir.node("Add", [product.outputs[0], bias])]


class BlockProduct(Product):
    """A product with 4-bit codes, or two products with the halves of wider codes."""

    operator = "MatMulNBits"

    def __init__(self, name: str, source: object, grid: Grid) -> None:
        super().__init__(name, source)
        self.grid, codes = grid, grid.codes
        self.parts = [self._part(shift) for shift in grid.halves]
        self.order, self.least = None, None
        order = codes.order
        if order is not None:
            self.order = self.constant("order", _INT64, (codes.columns,), lambda: order)
        if codes.shifted:
            self.least = self.constant("least", _FLOAT, (codes.count, codes.rows), grid.least)
        self.reason = self._reason()

    def _part(self, shift: int) -> list[ir.Value | None]:
        grid, rows = self.grid, self.grid.codes.rows
        what = "" if len(grid.halves) == 1 else ".high" if shift else ".low"
        size = (rows, grid.count, grid.block * GRID_BITS // 8)
        blocks = self.constant(f"codes{what}", _UINT8, size, lambda: grid.blocks(shift))
        scales = self.constant(f"scales{what}", _FLOAT, (rows, grid.count), lambda: grid.scales(shift))
        if grid.zero(shift) == MIDDLE:
            return [blocks, scales, None]
        wide = grid.wide(shift)
        kind, shape = (_FLOAT, (rows, grid.count)) if wide else (_UINT8, (rows, -(-grid.count // 2)))
        return [blocks, scales, self.constant(f"zeros{what}", kind, shape, lambda: grid.zeros(shift))]

    def _reason(self) -> str:
        codes = self.grid.codes
        told = [f"its codes of {codes.bits} bits fit into 4, and activations stay float32 (accuracy level 0)"]
        if codes.bits > GRID_BITS:
            told = [f"codes of {codes.bits} bits as two products of 4 bits: one of 8 bits is 15 times slower"]
        if any(map(self.grid.wide, self.grid.halves)):
            told.append("a zero of 2^bits fits into no 4 bits: zeros are floats")
        if codes.order is not None:
            told.append("the input's columns are gathered in the order of the blocks")
        if codes.shifted:
            told.append("least values are a product with the sums of the input's blocks")
        return "; ".join(told)

    def nodes(self, x: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
        made: list[ir.Node] = []
        if self.order is not None:
            made.append(ir.node("Gather", [x, self.order], {"axis": -1}))
            rank = x.shape
            x = made[-1].outputs[0]
            x.shape = rank
        codes = self.grid.codes
        told = {"K": codes.columns, "N": codes.rows, "bits": GRID_BITS, "block_size": self.grid.block}
        total: ir.Value | None = None
        for part in self.parts:
            inputs = [x, *part, *([] if bias is None or total is not None else [None, bias])]
            while inputs[-1] is None:
                inputs.pop()
            made.append(ir.node("MatMulNBits", inputs, {**told, "accuracy_level": _EXACT}, domain=DOMAIN))
            if total is not None:
                made.append(ir.node("Add", [total, made[-1].outputs[0]]))
            total = made[-1].outputs[0]
        if self.least is not None:
            assert total is not None
            made += self._less(x, total, self.least)
        return made

    def _less(self, x: ir.Value, total: ir.Value, least: ir.Value) -> list[ir.Node]:
        """Subtract the least value of each block, times the sum of the block's inputs."""
        assert x.shape is not None
        codes = self.grid.codes
        shape = ir.node("Constant", [], {"value_ints": [*([0] * (len(x.shape) - 1)), codes.count, codes.block]})
        axes = ir.node("Constant", [], {"value_ints": [-1]})
        cut = ir.node("Reshape", [x, shape.outputs[0]])
        sums = ir.node("ReduceSum", [cut.outputs[0], axes.outputs[0]], {"keepdims": 0})
        product = ir.node("MatMul", [sums.outputs[0], least])
        return [shape, axes, cut, sums, product, ir.node("Sub", [total, product.outputs[0]])]


class FloatProduct(Product):
    """A product with 8-bit floats, which are scaled to float32 when they are used."""

    operator = "DequantizeLinear"
    reason = "ONNX Runtime has no product of 8-bit floats on a CPU: they are scaled to float32 as they are used"

    def __init__(self, name: str, source: object, codes: Floats8) -> None:
        super().__init__(name, source)
        self.by_row = codes.block >= codes.columns
        self.block = 0 if self.by_row else codes.block
        self.values = self.constant(
            *("codes", ir.DataType.FLOAT8E4M3FN, (codes.columns, codes.rows)), lambda: _transposed(codes.values)
        )
        shape = (codes.rows,) if self.by_row else (-(-codes.columns // codes.block), codes.rows)
        self.scales = self.constant("scales", _FLOAT, shape, lambda: codes.scales().T)

    def nodes(self, x: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
        told = {"axis": 1} if self.by_row else {"axis": 0, "block_size": self.block}
        wide = ir.node("DequantizeLinear", [self.values, self.scales], told)
        product = ir.node("MatMul", [x, wide.outputs[0]])
        return [wide, product, *([] if bias is None else [ir.node("Add", [product.outputs[0], bias])])]


def _transposed(values: Tensor) -> Tensor:
    return values.view(torch.uint8).T.contiguous().view(values.dtype)


def least_opset(codes: Codes) -> int:
    """Return the first version of ONNX's operators that can hold these codes; 0 if any can."""
    if not isinstance(codes, Floats8):
        return 0
    return 19 if codes.block >= codes.columns else 21


def product_for(codes: Codes, name: str, source: object, opset: int, *, by_row: bool = False) -> Product | str:
    """Make the product that replaces a weight, with rows to pick if `by_row`; or say why no operator can."""
    if isinstance(codes, Tabled):
        return TableProduct(name, source, codes, by_row=by_row)
    if isinstance(codes, Floats8):
        needed = least_opset(codes)
        return FloatProduct(name, source, codes) if opset >= needed else f"its operator needs opset {needed}"
    if not isinstance(codes, Blocks):
        return "no operator has codes of this kind"
    grid = Grid.of(codes)
    if grid is None:
        return f"no operator has blocks of {codes.block}"
    return BlockProduct(name, source, grid)
