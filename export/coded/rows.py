"""Look up rows of a weight that is held as codes: the codes are gathered, and only these rows are dequantised.

The lookups read the initializers of the product with the weight. An embedding tied to the head is therefore in the file
only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from peftfx.export.coded.operators import BlockProduct, Product, TableProduct
from peftfx.quantisation.codes import TABLES

OPERATOR = "Gather"
REASON = "rows are gathered as codes, and dequantised where they are read"


@dataclass(frozen=True)
class CodedSum:
    """One term of the sum that a weight in blocks is.

    Attributes:
        blocks: the bytes of the codes, uint8 [out, ...].
        scales: the scales of the blocks, [out, blocks].
        zeros: the zeros of the blocks, packed like the codes, or as floats; None if all blocks share one zero.
        middle: the zero that all blocks share; otherwise 0.
    """

    blocks: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    middle: int


@dataclass(frozen=True)
class CodedRows:
    """A weight [out, in] whose rows are read separately.

    Attributes:
        parts: the terms whose sum is the weight.
        count, block: the number of blocks in a row, and of columns in a block; the last block may be padded.
        columns: the number of columns of the weight.
        bytes: gives the table [256, n] of the codes in each byte, minus the zero that all blocks share.
        least: float [blocks, out], subtracted at the end from blocks of `least_block` columns; None if there is none.
        least_block: the number of columns of such a block.
    """

    parts: Sequence[CodedSum]
    count: int
    block: int
    columns: int
    bytes: Callable[[int], ir.Value]
    least: ir.Value | None = None
    least_block: int = 0


def codes_of_bytes(bits: int, middle: int) -> Tensor:
    """Return float32 [256, 8 / bits]: the codes in each byte, the low half first, minus the zero `middle`."""
    byte = torch.arange(256)
    parts = [byte] if bits == 8 else [byte & 15, byte >> 4]
    return torch.stack(parts, 1).float() - middle


def coded_rows(product: Product) -> CodedRows | str:
    """Return the rows of the weight that a product holds, or say why rows cannot be looked up."""
    if isinstance(product, TableProduct):
        if not product.by_row:
            return "rows of its codes do not begin with a byte of their own"
        numbers = torch.tensor(TABLES[product.codes.table])
        pairs = torch.cartesian_prod(numbers, numbers)
        part = CodedSum(product.packed, product.magnitudes, None, 0)
        columns = product.codes.columns
        return CodedRows([part], columns // product.block, product.block, columns, _tables(product, lambda _: pairs))
    if not isinstance(product, BlockProduct):
        return "rows of its codes do not begin with a byte of their own"
    grid, codes = product.grid, product.grid.codes
    if codes.order is not None:
        return "its columns are in another order"
    parts = []
    for shift, (blocks, scales, zeros) in zip(grid.halves, product.parts, strict=True):
        assert blocks is not None
        assert scales is not None
        middle = grid.zero(shift)
        parts.append(CodedSum(blocks, scales, zeros if middle is None else None, 0 if middle is None else middle))
    tables = _tables(product, lambda middle: codes_of_bytes(4, middle))
    return CodedRows(parts, grid.count, grid.block, codes.columns, tables, product.least, codes.block)


def _tables(product: Product, read: Callable[[int], Tensor]) -> Callable[[int], ir.Value]:
    def table(middle: int) -> ir.Value:
        what = f"pairs{middle}"
        made = {value.name: value for value in product.initializers}
        found = made.get(f"{product.name}.{what}")
        return found or product.constant(what, ir.DataType.FLOAT, (256, 2), lambda: read(middle))

    return table


def row_nodes(rows: CodedRows, ids: ir.Value) -> list[ir.Node]:
    """Make the nodes that look up rows [..., in] of a weight [out, in]. The last node has the rows.

    Args:
        rows: the weight's rows.
        ids: the numbers of the rows: integers of a known rank.
    """
    return _Rows(rows, ids).run()


class _Rows:
    def __init__(self, rows: CodedRows, ids: ir.Value) -> None:
        assert ids.shape is not None
        self.rows, self.ids, self.rank = rows, ids, len(ids.shape)
        self.nodes = list[ir.Node]()

    def run(self) -> list[ir.Node]:
        rows = self.rows
        total: ir.Value | None = None
        for part in rows.parts:
            value = self._reshaped(self._codes(part.blocks, part.middle), [rows.count, rows.block])
            if part.zeros is not None:
                value = self._add("Sub", [value, self._over_blocks(self._zeros(part.zeros))])
            value = self._add("Mul", [value, self._over_blocks(self._picked(part.scales))])
            total = value if total is None else self._add("Add", [total, value])
        assert total is not None
        whole = self._reshaped(total, [rows.count * rows.block])
        if rows.count * rows.block != rows.columns:
            ends = [self._numbers([0]), self._numbers([rows.columns]), self._numbers([-1])]
            whole = self._add("Slice", [whole, *ends])
        if rows.least is not None:
            whole = self._reshaped(whole, [-(-rows.columns // rows.least_block), rows.least_block])
            least = self._add("Gather", [rows.least, self.ids], axis=1)
            last = self._add("Transpose", [least], perm=[*range(1, self.rank + 1), 0])
            whole = self._reshaped(self._add("Sub", [whole, self._over_blocks(last)]), [rows.columns])
        return self.nodes

    def _codes(self, packed: ir.Value, middle: int) -> ir.Value:
        """Look up [..., bytes, codes of a byte]: the rows' codes, minus the zero that all blocks share."""
        numbers = self._add("Cast", [self._picked(packed)], to=int(ir.DataType.INT32))
        return self._add("Gather", [self.rows.bytes(middle), numbers], axis=0)

    def _zeros(self, zeros: ir.Value) -> ir.Value:
        """Look up the zeros of the rows' blocks, [..., blocks]."""
        if zeros.dtype != ir.DataType.UINT8:
            return self._picked(zeros)
        assert zeros.shape is not None
        count, table = self.rows.count, self.rows.bytes(0)
        assert table.shape is not None
        held = int(str(zeros.shape[1])) * int(str(table.shape[1]))
        flat = self._reshaped(self._codes(zeros, 0), [held])
        if held == count:
            return flat
        return self._add("Slice", [flat, self._numbers([0]), self._numbers([count]), self._numbers([-1])])

    def _picked(self, tensor: ir.Value) -> ir.Value:
        return self._add("Gather", [tensor, self.ids], axis=0)

    def _over_blocks(self, value: ir.Value) -> ir.Value:
        return self._add("Unsqueeze", [value, self._numbers([-1])])

    def _reshaped(self, value: ir.Value, last: list[int]) -> ir.Value:
        return self._add("Reshape", [value, self._numbers([*([0] * self.rank), *last])])

    def _numbers(self, values: list[int]) -> ir.Value:
        return self._add("Constant", [], value_ints=values)

    def _add(self, operator: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        self.nodes.append(ir.node(operator, inputs, attributes))  # type: ignore[arg-type]
        return self.nodes[-1].outputs[0]
