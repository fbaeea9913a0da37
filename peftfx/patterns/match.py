"""Match: where a graph computes what a pattern says, and how far the search for it got."""

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
    """Where a graph computes what a pattern's function computes.

    Attributes:
        y: the node that has the function's value.
        operands: nodes, by the function's names; the first is what it is a function of.
        numbers: values of its free numbers.
        inner: the nodes between, `y` among them.
        spelling: which of the pattern's it was.
    """

    y: fx.Node
    operands: Mapping[str, fx.Node]
    numbers: Mapping[str, float]
    inner: tuple[fx.Node, ...]
    spelling: Spelling = field(repr=False)

    def value(self, name: str) -> Tensor:
        """An operand as a fake tensor: its shape and dtype."""
        value = self.operands[name].meta["val"]
        assert isinstance(value, Tensor)
        return value

    def weight(self, name: str) -> str:
        """The name of the base's tensor that an operand is; empty where it is none."""
        return weight_of(self.operands[name]).partition(".")[2]

    @property
    def module(self) -> str:
        """The path of the innermost module that all of it runs in."""
        paths = [module_path(node).split(".") for node in self.inner]
        common = paths[0]
        for path in paths[1:]:
            equal = [a == b for a, b in zip(common, path, strict=False)]
            common = common[: equal.index(False) if False in equal else len(equal)]
        return ".".join(common)


def weight_of(node: fx.Node) -> str:
    """The `get_attr` target of the base's tensor that a value is, however it was cast; empty where it is none."""
    node = uncast(node)
    return str(node.target) if node.op == "get_attr" and str(node.target).startswith(f"{BASE}.") else ""


def uncast(node: fx.Node) -> fx.Node:
    """What a value was before it was cast or copied."""
    while (source := copied_from(node)) is not None:
        node = source
    return node


@dataclass
class Trail:
    """How far a match came: what was expected and found where it ended, of the attempt that came furthest.

    Attributes:
        whole: whether what matches behind the first difference counts too: for explanations.
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
    """Nodes of a program that stand for nodes of the graph, numbers that are told, and how many operators matched."""

    nodes: Mapping[fx.Node, fx.Node]
    numbers: Mapping[str, float]
    matched: int = 0


def copied_from(node: fx.Node) -> fx.Node | None:
    """What a node copies or casts, or passes on as it is; None where it computes."""
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
