"""Matcher: compares a pattern's nodes with a graph's nodes, from a value backwards through its operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from peftfx.analysis.dataflow import names, op_name
from peftfx.patterns.match import Bound, Trail, copied_from, uncast

_COMMUTE = names("add mul maximum minimum logical_and logical_or bitwise_and bitwise_or")
_DIMS = names("dim dims dim0 dim1 axis")
_SIZED = ("SymInt", "SymInt[]", "List[int]")
_LEFT_OUT = frozenset({"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format", "copy"})
_END = 2**63 - 1  #: the end of a slice without an end
_MOST_STEPS = 5_000  #: the most steps at one node: a near match with many sums has many orders of operands


class Matcher:
    """Searches for one program's value in a graph."""

    def __init__(self, program: fx.GraphModule, numbers: Mapping[float, str], trail: Trail, *, strict: bool) -> None:
        (output,) = program.graph.find_nodes(op="output")
        self.root = uncast(output.args[0])
        self.numbers, self.trail, self.strict = numbers, trail, strict

    def at(self, node: fx.Node) -> Iterator[Bound]:
        """Yield every way in which this node has the program's value."""
        self.trail.steps = 0
        return self._node(self.root, node, Bound({}, {}))

    def _node(self, p: fx.Node, g: object, bound: Bound) -> Iterator[Bound]:
        self.trail.steps += 1
        if self.trail.steps > _MOST_STEPS:
            return
        if not isinstance(g, fx.Node):
            if isinstance(p.meta.get("val"), torch.SymInt) and (not self.strict or str(p.meta["val"]) == str(g)):
                yield bound
            else:
                self._fail(bound, g, f"a number, {g}, where {_said(p)} is expected")
            return
        inner, casts = p, 0
        while (source := copied_from(inner)) is not None:
            inner, casts = source, casts + 1
        if inner.op == "placeholder":
            yield from self._operand(inner, casts, g, bound)
            return
        if not isinstance(inner.meta.get("val"), (Tensor, list, tuple)):
            if not self.strict or str(inner.meta.get("val")) == str(g.meta.get("val")):
                yield bound
            else:
                self._fail(bound, g, f"{inner.meta.get('val')} is expected, and {g.meta.get('val')} is there")
            return
        g = uncast(g)
        known = bound.nodes.get(inner)
        if known is not None:
            if known is g:
                yield bound
            else:
                self._fail(bound, g, f"the value of {known.name} is expected once more")
            return
        if g.op != "call_function" or op_name(g) != op_name(inner):
            self._fail(bound, g, f"{_said(inner)} is expected, and {_said(g)} is there")
            return
        mine, theirs = _arguments(inner), _arguments(g)
        opened = dataclasses.replace(bound, matched=bound.matched + 1)
        for one, other in _orders(inner, mine, theirs):
            for found in self._all(list(one.items()), other, inner, g, opened):
                yield dataclasses.replace(found, nodes={**found.nodes, inner: g})

    def _operand(self, p: fx.Node, casts: int, g: fx.Node, bound: Bound) -> Iterator[Bound]:
        for _ in range(casts):
            source = copied_from(g)
            g = g if source is None else source
        if not isinstance(g.meta.get("val"), Tensor):
            self._fail(bound, g, f"a tensor is expected for {p.name}")
            return
        known = bound.nodes.get(p)
        if known is None:
            yield dataclasses.replace(bound, nodes={**bound.nodes, p: g})
        elif uncast(known) is uncast(g):
            yield bound
        else:
            self._fail(bound, g, f"{known.name} is expected once more, as {p.name}, and {g.name} is there")

    def _all(
        self, mine: list[tuple[str, object]], theirs: Mapping[str, object], p: fx.Node, g: fx.Node, bound: Bound
    ) -> Iterator[Bound]:
        """Yield every way in which all of these arguments match."""
        if not mine:
            yield bound
            return
        (name, value), *rest = mine
        matched = False
        for found in self._argument(name, value, theirs.get(name), p, g, bound):
            matched = True
            yield from self._all(rest, theirs, p, g, found)
        if not matched and self.trail.whole and rest:
            self._credit((name, value), rest, theirs, p, g, bound)

    def _credit(
        self,
        failed: tuple[str, object],
        rest: list[tuple[str, object]],
        theirs: Mapping[str, object],
        p: fx.Node,
        g: fx.Node,
        bound: Bound,
    ) -> None:
        """Count what matches beside an argument that does not match, to explain how close a near miss is."""
        found = next(self._all(rest, theirs, p, g, bound), None)
        if found is not None and found.matched > bound.matched:
            trail, self.trail = self.trail, Trail()
            next(self._argument(*failed, theirs.get(failed[0]), p, g, bound), None)
            ended, self.trail = self.trail, trail
            trail.ended(ended.reached + found.matched - bound.matched, ended.node, ended.why)

    def _argument(
        self, name: str, value: object, other: object, p: fx.Node, g: fx.Node, bound: Bound
    ) -> Iterator[Bound]:
        if isinstance(value, fx.Node):
            yield from self._node(value, other, bound)
            return
        if isinstance(value, (list, tuple)) and any(isinstance(v, fx.Node) for v in value):
            if not isinstance(other, (list, tuple)) or len(other) != len(value):
                self._fail(bound, g, f"{len(value)} values are expected as {name}")
                return
            pairs = list(zip(value, other, strict=True))
            yield from self._each(name, pairs, p, g, bound)
            return
        if isinstance(value, float) and (own := self.numbers.get(round(value, 6))) is not None:
            yield from self._number(own, other, g, bound)
            return
        if self._same(name, value, other, p, g):
            yield bound
        else:
            there = other.name if isinstance(other, fx.Node) else other
            self._fail(bound, g, f"{op_name(p)} with {name}={value} is expected, and {name} is {there}")

    def _each(
        self, name: str, pairs: list[tuple[object, object]], p: fx.Node, g: fx.Node, bound: Bound
    ) -> Iterator[Bound]:
        if not pairs:
            yield bound
            return
        (value, other), *rest = pairs
        for found in self._argument(name, value, other, p, g, bound):
            yield from self._each(name, rest, p, g, found)

    def _number(self, name: str, other: object, g: fx.Node, bound: Bound) -> Iterator[Bound]:
        if isinstance(other, bool) or not isinstance(other, (int, float)):
            self._fail(bound, g, f"a number is expected for {name}")
        elif bound.numbers.get(name, float(other)) != float(other):
            self._fail(bound, g, f"{name} is {bound.numbers[name]} elsewhere, and {other} here")
        else:
            yield dataclasses.replace(bound, numbers={**bound.numbers, name: float(other)})

    def _same(self, name: str, value: object, other: object, p: fx.Node, g: fx.Node) -> bool:
        if isinstance(other, fx.Node):
            return (not self.strict and isinstance(value, int)) or str(other.meta.get("val")) == str(value)
        if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
            pairs = zip(value, other, strict=False)
            return len(value) == len(other) and all(self._same(name, a, b, p, g) for a, b in pairs)
        if value == other:
            return True
        if name in _DIMS and isinstance(value, int) and isinstance(other, int):
            return _from_end(value, p) == _from_end(other, g)
        return not self.strict and _is_size(p, name)

    def _fail(self, bound: Bound, node: object, why: str) -> None:
        self.trail.ended(bound.matched, node, why)


def _from_end(dim: int, node: fx.Node) -> int:
    source = next((n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)), None)
    return dim if dim < 0 or source is None else dim - source.ndim


def _is_size(node: fx.Node, name: str) -> bool:
    """Return whether an argument is a size, which may differ in another trace."""
    schema = getattr(node.target, "_schema", None)
    kinds = {a.name: str(a.real_type) for a in schema.arguments} if schema is not None else {}
    return kinds.get(name, "").removeprefix("Optional[").removesuffix("]") in _SIZED or "SymInt" in kinds.get(name, "")


def _arguments(node: fx.Node) -> dict[str, object]:
    """Return a node's arguments by name, with defaults, without those that say where and how a value is stored."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    named = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    named |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    named |= dict(node.kwargs)
    if op_name(node) == "slice":
        named |= {"start": named["start"] or 0, "end": _END if _is_last(named) else named["end"]}
    return {name: value for name, value in named.items() if name not in _LEFT_OUT}


def _is_last(named: Mapping[str, object]) -> bool:
    """Return whether a slice goes to the end of its axis, however that is written."""
    source, dim, end = named["self"], named["dim"], named["end"]
    if not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    return end is None or end == _END or (isinstance(end, int) and end == source.meta["val"].shape[dim])


def _orders(
    p: fx.Node, mine: dict[str, object], theirs: dict[str, object]
) -> Iterator[tuple[dict[str, object], dict[str, object]]]:
    yield mine, theirs
    if op_name(p) in _COMMUTE and theirs.get("alpha", 1) == 1:
        first, second, *_ = theirs
        yield mine, {**theirs, first: theirs[second], second: theirs[first]}


def _said(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name}"
    return f"the tensor {node.target}" if node.op == "get_attr" else str(node.target).removesuffix(".default")
