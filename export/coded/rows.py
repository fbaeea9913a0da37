"""row_nodes: what picks rows of a weight that is held as codes: codes are gathered, and those rows alone dequantised.

The initializers are those of the product with the weight, so an embedding that is the head, too, is in a file once.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from peftfx.export.coded.grid import GRID_BITS
from peftfx.export.coded.operators import BlockProduct

OPERATOR = "Gather"
REASON = "rows are gathered as codes, and dequantised where they are read"


def refused_rows(product: object) -> str:
    """Why rows of such a weight cannot be picked so; empty where they can."""
    if not isinstance(product, BlockProduct):
        return "rows of its codes do not begin with a byte of their own"
    return "its columns are in another order" if product.grid.codes.order is not None else ""


def row_nodes(product: BlockProduct, ids: ir.Value) -> list[ir.Node]:
    """Nodes for the float32 rows [..., in] of a weight [out, in], given their numbers; the last has them.

    Args:
        product: holds the weight; it gets the tables that are read here.
        ids: integers, of a known rank.
    """
    return _Rows(product, ids).run()


class _Rows:
    def __init__(self, product: BlockProduct, ids: ir.Value) -> None:
        assert ids.shape is not None
        self.product, self.ids, self.rank = product, ids, len(ids.shape)
        self.grid, self.nodes = product.grid, list[ir.Node]()

    def run(self) -> list[ir.Node]:
        grid, codes = self.grid, self.grid.codes
        total: ir.Value | None = None
        for shift, (blocks, scales, zeros) in zip(grid.halves, self.product.parts, strict=True):
            assert blocks is not None
            assert scales is not None
            middle = grid.zero(shift)
            value = self._reshaped(self._halves(blocks, 0 if middle is None else middle), [grid.count, grid.block])
            if middle is None:
                assert zeros is not None
                value = self._add("Sub", [value, self._over_blocks(self._zeros(zeros))])
            value = self._add("Mul", [value, self._over_blocks(self._picked(scales))])
            total = value if total is None else self._add("Add", [total, value])
        assert total is not None
        whole = self._reshaped(total, [grid.count * grid.block])
        if grid.count * grid.block != codes.columns:
            ends = [self._numbers([0]), self._numbers([codes.columns]), self._numbers([-1])]
            whole = self._add("Slice", [whole, *ends])
        if self.product.least is not None:
            whole = self._reshaped(whole, [codes.count, codes.block])
            least = self._add("Gather", [self.product.least, self.ids], axis=1)
            last = self._add("Transpose", [least], perm=[*range(1, self.rank + 1), 0])
            whole = self._reshaped(self._add("Sub", [whole, self._over_blocks(last)]), [codes.columns])
        return self.nodes

    def _halves(self, packed: ir.Value, middle: int) -> ir.Value:
        """float32 [..., bytes, 2]: the two codes of each byte of the rows, less the zero that all have."""
        byte = torch.arange(256)
        pairs = torch.stack([byte & 15, byte >> GRID_BITS], 1).float() - middle
        what = f"pairs{middle}"
        name = f"{self.product.name}.{what}"
        made = {value.name: value for value in self.product.initializers}
        table = made.get(name) or self.product.constant(what, ir.DataType.FLOAT, (256, 2), lambda: pairs)
        numbers = self._add("Cast", [self._picked(packed)], to=int(ir.DataType.INT32))
        return self._add("Gather", [table, numbers], axis=0)

    def _zeros(self, zeros: ir.Value) -> ir.Value:
        """float32 [..., blocks]."""
        if zeros.dtype == ir.DataType.FLOAT:
            return self._picked(zeros)
        count = self.grid.count
        flat = self._reshaped(self._halves(zeros, 0), [count + count % 2])
        if count % 2 == 0:
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
