"""Rows: which rows of a fused weight reach which node, found by sending row numbers through the ops that move data.

Every entry of a weight op's output belongs to one row of the weight. The numbers of these rows, in place of the
output's values, are sent from the op to a later node. Ops that move data move the numbers. Ops that combine entries
of one position, as rotary embeddings do, keep both numbers. A convolution of each channel by itself keeps its row.
Free sizes of the graph take the values of its example. Sizes that depend on the values of a tensor take any, except
where they split or index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from peftfx.analysis.dataflow import ACTIVATED, MOVEMENT, PRODUCTS, Flow, is_depthwise, names, op_name
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.sites.blocks import Rows

Numbers = list[torch.Tensor]  # of one shape: the rows that each entry comes from, counted from 1; 0 means no row

_RESHAPES = names("view _unsafe_view view_as reshape_as")
_JOINING = names("cat concat concatenate stack hstack vstack")
_READ = 11  #: prime, and so no count of heads or the like


class RowTracer:
    """Sends the row numbers of one weight op forward. A node's numbers are computed when they are first read."""

    def __init__(self, graph: Graph, flows: Mapping[fx.Node, Flow], op: fx.Node, axis: int, size: int) -> None:
        self.graph, self.flows, self.op = graph, flows, op
        self._numbers: dict[fx.Node, Numbers | list[Numbers]] = {op: [_numbered(_shape(op), axis, size)]}
        self._constants: dict[fx.Node, Any] = {}

    def rows_at(self, node: fx.Node) -> set[int]:
        """Return the rows of the weight that reach this node."""
        return _rows(_flatten(self._at(node)))

    def numbers_at(self, node: fx.Node) -> Numbers:
        """Return the row numbers that each entry of this node comes from, counted from 1; 0 means no row.

        There are several tensors if entries come from several rows; the first tensor is that of the first operand.
        """
        return _flatten(self._at(node))

    def gate_and_up(self, node: fx.Node) -> tuple[set[int], set[int]] | None:
        """Return the activated (gate) and the other (up) rows, if two halves are multiplied before `node`."""
        for product in self._between(node):
            halves = [n for n in product.all_input_nodes if self.op in self.flows[n].origins]
            if op_name(product) == "glu":
                dim = product.args[1] if len(product.args) > 1 else -1
                assert isinstance(dim, int)
                up, gate = zip(*(n.chunk(2, dim) for n in _flatten(self._at(halves[0]))), strict=True)
                return _rows(gate), _rows(up)
            if op_name(product) not in PRODUCTS or len(halves) != 2:
                continue
            halves.sort(key=lambda n: not self.flows[n].origins[self.op] & ACTIVATED)
            gate_rows, up_rows = (self.rows_at(half) for half in halves)
            active = [bool(self.flows[half].origins[self.op] & ACTIVATED) for half in halves]
            if active == [True, False] and not gate_rows & up_rows:
                return gate_rows, up_rows
        return None

    def _between(self, node: fx.Node) -> Iterable[fx.Node]:
        seen, todo = {node}, [node]
        while todo:
            current = todo.pop()
            yield current
            for previous in current.all_input_nodes:
                if current is not self.op and previous not in seen and self.op in self.flows[previous].origins:
                    seen.add(previous)
                    todo.append(previous)

    def _at(self, node: fx.Node) -> Numbers | list[Numbers]:
        for pending in _in_order(node, self._inputs) if node not in self._numbers else ():
            self._numbers[pending] = self._step(pending)
        return self._numbers[node]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if node in self._numbers:
            return []
        return [n for n in node.all_input_nodes if self.op in self.flows[n].origins and n not in self._numbers]

    def _step(self, node: fx.Node) -> Numbers | list[Numbers]:
        sources = [n for n in node.all_input_nodes if n in self._numbers]
        if op_name(node) in MOVEMENT:
            return self._moved(node, sources)
        shape = _shape(node)
        if is_depthwise(node):
            return [n.expand(shape) for numbers in _flatten(self._numbers[sources[0]]) for n in _by_channel(numbers)]
        spread = [_fit(numbers, shape) for n in sources for numbers in _flatten(self._numbers[n])]
        return _distinct(n for n in spread if n is not None)

    def _moved(self, node: fx.Node, sources: list[fx.Node]) -> Numbers | list[Numbers]:
        if op_name(node) == "getitem":
            value, index = self._numbers[sources[0]], node.args[1]
            assert isinstance(index, int)
            return value[index] if value else []  # type: ignore[return-value]
        if not all(self._numbers[n] for n in sources):
            return []
        variants = max(len(self._numbers[n]) for n in sources)
        results = [self._run(node, i) for i in range(variants)]
        if isinstance(results[0], torch.Tensor):
            return _distinct(r for r in results if isinstance(r, torch.Tensor))
        return [list(pieces) for pieces in zip(*results, strict=True)]

    def _run(self, node: fx.Node, variant: int) -> torch.Tensor | list[torch.Tensor]:
        def concrete(value: fx.Node) -> Any:
            if value not in self._numbers:
                return self._no_rows(value) if op_name(node) in _JOINING else self.constant(value)
            numbers = self._numbers[value]
            return numbers[min(variant, len(numbers) - 1)]

        if op_name(node) in _RESHAPES:
            return concrete(node.all_input_nodes[0]).reshape(_shape(node))
        return _call(node, concrete)

    def _no_rows(self, node: fx.Node) -> torch.Tensor:
        return torch.zeros(_shape(node), dtype=torch.int64, device="cpu")

    def constant(self, node: fx.Node) -> Any:
        """Return the value of a size or index that does not depend on the weight, at the example's sizes."""
        for pending in _in_order(node, self._needs):
            if pending not in self._constants:
                self._constants[pending] = self._evaluate(pending)
        return self._constants[node]

    def _evaluate(self, node: fx.Node) -> object:
        value = node.meta.get("val")
        if node.op == "get_attr":
            return self.graph.get(str(node.target))
        if isinstance(value, torch.Tensor) and (node.op == "placeholder" or self.flows[node].origins):
            return torch.zeros(_shape(node), dtype=value.dtype, device="cpu")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            return hint(value)
        return _call(node, self._constants.__getitem__)

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that a constant is computed from; none for values of inputs or other weights."""
        is_constant = isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)) and not self.flows[node].origins
        return node.all_input_nodes if is_constant else []


def as_ranges(rows: set[int]) -> Rows:
    """Return sorted, half-open ranges that hold exactly these rows."""
    ranges: list[tuple[int, int]] = []
    for row in sorted(rows):
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return tuple(ranges)


def hint(size: object) -> int:
    """Return the value that a size had in the example that the graph was captured with.

    Raises:
        PeftfxError: the size has no such value, because it depends on the values of a tensor.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)  # type: ignore[call-overload]
    if size.node.hint is None:
        what = "a size in this model's code depends on the values of a tensor: sites cannot be found after it"
        raise PeftfxError(what, str(size), "pass arguments or a config that avoid it")
    return int(size.node.hint)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(_length(size) for size in node.meta["val"].shape)


def _length(size: object) -> int:
    """Return the value of a size in the example, as if each number that was read from a tensor had been `_READ`.

    It is the number of tokens that a mask chooses, say: at each of them, the rows of a weight are the same.
    """
    return optimization_hint(size, fallback=_READ)  # type: ignore[arg-type]


def _numbered(shape: tuple[int, ...], axis: int, size: int) -> torch.Tensor:
    view = [1] * len(shape)
    view[axis] = size
    return torch.arange(1, size + 1, device="cpu").view(view).expand(shape)


def _call(node: fx.Node, concrete: Callable[[fx.Node], Any]) -> Any:
    assert callable(node.target)
    args = fx.node.map_arg(node.args, concrete)
    return node.target(*args, **fx.node.map_arg(dict(node.kwargs), concrete))


def _rows(numbers: Iterable[torch.Tensor]) -> set[int]:
    return {row - 1 for n in numbers for row in _present(n) if row}


def _present(numbers: torch.Tensor) -> list[int]:
    """Return the distinct numbers of a tensor, by marking each. Sorting would take longer than the capture."""
    marks = torch.zeros(int(numbers.max()) + 1, dtype=torch.bool) if numbers.numel() else torch.zeros(0)
    marks[numbers.reshape(-1)] = True
    return marks.nonzero().flatten().tolist()


def _fit(numbers: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Expand the numbers to the shape of a result, or return None for statistics, which have no rows."""
    aligned = zip(reversed(numbers.shape), reversed(shape), strict=False)
    fits = numbers.ndim <= len(shape) and all(size in (1, wanted) for size, wanted in aligned)
    return numbers.expand(shape) if fits else None


def _by_channel(numbers: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the row of each channel [batch, channels, *positions], if it is the same at all positions that have one."""
    positions = tuple(range(2, numbers.ndim))
    rows = numbers.amax(positions, keepdim=True)
    if torch.equal(numbers, torch.where(numbers == 0, 0, rows.expand_as(numbers))):
        yield rows


def _flatten(numbers: Numbers | list[Numbers]) -> Numbers:
    return [t for n in numbers for t in ([n] if isinstance(n, torch.Tensor) else n)]


def _distinct(numbers: Iterable[torch.Tensor]) -> Numbers:
    kept: Numbers = []
    for candidate in numbers:
        if not any(torch.equal(candidate, other) for other in kept):
            kept.append(candidate)
    return kept


def _in_order(node: fx.Node, inputs: Callable[[fx.Node], list[fx.Node]]) -> Iterable[fx.Node]:
    """Return the node and all nodes that it needs, each after those that it needs itself."""
    needed, todo = {node}, [node]
    while todo:
        for previous in inputs(todo.pop()):
            if previous not in needed:
                needed.add(previous)
                todo.append(previous)
    return sorted(needed)
