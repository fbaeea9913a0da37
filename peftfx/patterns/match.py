"""Match: a place where a graph computes what a pattern says, and a record of how far a search came."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from peftfx.analysis.dataflow import names, op_name
from peftfx.analysis.weight_ops import module_path
from peftfx.graph.graph import BASE
from peftfx.patterns.spelling import Spelling

_CASTS = names("to _to_copy type_as float half bfloat16 double")
_COPIES = _CASTS | names("clone contiguous detach alias lift_fresh_copy")


@dataclass(frozen=True)
class Match:
    """A place where a graph computes what a pattern's function computes.

    Attributes:
        y: the node that has the function's value.
        operands: nodes, by the names of the function's arguments; the first is the argument that adapters read.
        numbers: the values of the function's free numbers.
        inner: the nodes from the operands to `y`, including `y`.
        spelling: the pattern's spelling that matched.
    """

    y: fx.Node
    operands: Mapping[str, fx.Node]
    numbers: Mapping[str, float]
    inner: tuple[fx.Node, ...]
    spelling: Spelling = field(repr=False)

    def value(self, name: str) -> Tensor:
        """Return the operand `name` as a fake tensor, for its shape and dtype."""
        value = self.operands[name].meta["val"]
        assert isinstance(value, Tensor)
        return value

    def weight(self, name: str) -> str:
        """Return the name of the base's tensor that the operand `name` is; empty if it is none."""
        return weight_of(self.operands[name]).partition(".")[2]

    @property
    def module(self) -> str:
        """The path of the innermost module that runs the whole match."""
        paths = [module_path(node).split(".") for node in self.inner]
        common = paths[0]
        for path in paths[1:]:
            equal = [a == b for a, b in zip(common, path, strict=False)]
            common = common[: equal.index(False) if False in equal else len(equal)]
        return ".".join(common)


def weight_of(node: fx.Node) -> str:
    """Return the `get_attr` target of the base's tensor that a value is, through casts; empty if it is none."""
    node = uncast(node)
    return str(node.target) if node.op == "get_attr" and str(node.target).startswith(f"{BASE}.") else ""


def uncast(node: fx.Node) -> fx.Node:
    """Return the node of a value before its casts and copies."""
    while (source := copied_from(node)) is not None:
        node = source
    return node


@dataclass
class Trail:
    """How far a search came: what was expected and found at the end of the attempt that came furthest.

    Attributes:
        whole: whether matches after the first difference count too, for explanations.
    """

    whole: bool = False
    reached: int = -1
    node: fx.Node | None = None
    why: str = ""
    steps: int = 0

    def ended(self, reached: int, node: object, why: str) -> None:
        if reached > self.reached:
            self.reached, self.why = reached, why
            self.node = node if isinstance(node, fx.Node) else self.node


@dataclass(frozen=True)
class Bound:
    """The matched nodes of a program, the values of its free numbers, and how many operators matched."""

    nodes: Mapping[fx.Node, fx.Node]
    numbers: Mapping[str, float]
    matched: int = 0


def copied_from(node: fx.Node) -> fx.Node | None:
    """Return the node that `node` copies, casts or passes on unchanged; None if it computes something."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    name = op_name(node)
    idle = name == "dropout" and len(node.args) > 2 and node.args[2] is False
    if not idle and (name not in _COPIES or not isinstance(node.meta.get("val"), Tensor)):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(value := source.meta.get("val"), Tensor):
        return None
    kept = value.dtype == node.meta["val"].dtype
    return source if kept or (value.is_floating_point() and node.meta["val"].is_floating_point()) else None
