"""Rewriter: the one way to make nodes in a graph, and to put one in another's place.

A new node has its value (`meta["val"]`, computed on fake tensors), the module whose code it stands for, and the tags
that it is made with. What takes another node's place takes it everywhere: in operands, in the calls of sites, and in
what insertions say they replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from peftfx.graph.graph import Graph
from peftfx.graph.trace import trace

REGION = "peftfx_region"  #: in `node.meta` of every inserted node: its `Region`
REPLACES = "peftfx_replaces"  #: in `node.meta` of a region's result: the name of the node whose place it took
OVERRIDES = "peftfx_overrides"  #: in `node.meta` of an adapter's tensor: the target of the base's tensor it stands for
_CODE = ("nn_module_stack", "stack_trace")  #: what says whose code a node is
_COMPUTED: Any = object()  #: asks for a value to be computed


class Rewriter:
    """Makes and replaces nodes of one graph.

    Attributes:
        graph: that is rewritten.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._attributes: dict[str, fx.Node] = {}
        self._became: dict[str, fx.Node | None] = {}
        self._extended: dict[str, fx.Node] = {}
        self._traces: dict[str, fx.GraphModule] = {}

    def before(self, node: fx.Node, like: fx.Node | None = None, **tags: object) -> Cursor:
        """Make nodes ahead of one, as code of the module that made `like`, by default of that one."""
        return Cursor(self, node, node if like is None else like, tags)

    def after(self, node: fx.Node, like: fx.Node | None = None, **tags: object) -> Cursor:
        """Make nodes behind one, as code of the module that made `like`, by default of that one."""
        return Cursor(self, node.next, node if like is None else like, tags)

    def end(self) -> Cursor:
        """Make nodes at the end: of a program without code of modules."""
        return Cursor(self, self.graph._root, None, {})

    def attribute(self, target: str, value: object, **tags: object) -> fx.Node:
        """The `get_attr` node for a target, made ahead of the graph's first other node where there is none yet."""
        if not self._attributes:
            self._attributes = {str(n.target): n for n in self.graph.nodes if n.op == "get_attr"}
        node = self._attributes.get(target)
        if node is None:
            first = next(n for n in self.graph.nodes if n.op != "get_attr")
            with self.graph.inserting_before(first):
                node = self.graph.create_node("get_attr", target, name=target.replace(".", "_"))
            node.meta["val"] = value
            self._attributes[target] = node
        node.meta.update(_keyed(tags))
        return node

    def placeholder(self, name: str, value: object, after: fx.Node | None = None) -> fx.Node:
        """A new input, behind one, or in a graph that has none yet."""
        place = self.graph._root if after is None else after
        with self.graph.inserting_after(place):
            node = self.graph.placeholder(name)
        node.meta = {"val": value}
        return node

    def tag(self, node: fx.Node, **tags: object) -> None:
        """Give a node tags that it gets behind its making."""
        node.meta.update(_keyed(tags))

    def revalue(self, node: fx.Node, value: object) -> None:
        """Say that a node has another value, where what it is given has changed."""
        node.meta["val"] = value

    def update(self, node: fx.Node, target: object, *args: Any, **kwargs: Any) -> None:
        """Let a node do something else, with its value computed anew; it keeps its place and its users."""
        node.target, node.args, node.kwargs = target, args, kwargs  # type: ignore[assignment]
        node.meta["val"] = _computed(target, args, kwargs)

    def replace(self, old: fx.Node, new: fx.Node, users: Collection[fx.Node] | None = None) -> None:
        """Put a node that has the same value in another's place, for these users, by default for all but itself.

        In the place of all users it is what calls and insertions name from now on.
        """
        chosen = [user for user in old.users if user is not new] if users is None else users
        for user in chosen:
            user.replace_input_with(old, new)
        if users is None:
            self._became[old.name] = new
            region = old.meta.get(REGION)
            if REPLACES in old.meta and REPLACES not in new.meta and new.meta.get(REGION, region) is region:
                new.meta.update({key: old.meta[key] for key in (REGION, REPLACES) if key in old.meta})
            if OVERRIDES in old.meta and OVERRIDES not in new.meta and new.op == "call_function":
                new.meta[OVERRIDES] = old.meta[OVERRIDES]

    def extend(self, old: fx.Node, new: fx.Node) -> None:
        """Let what a node computes on an operation's value stand for that; the operation itself is what it was."""
        self.replace(old, new, [user for user in old.users if user is not new])
        self._extended[old.name] = new

    def erase(self, node: fx.Node) -> None:
        """Take a node without users out; a call of a site that is not replaced goes with it."""
        self._became.setdefault(node.name, None)
        if node.op == "get_attr":
            self._attributes.clear()
        self.graph.erase_node(node)

    def close(self, graph: Graph) -> None:
        """End a rewrite of a graph: what its sites' calls and its insertions name are its nodes again."""
        if self._became or self._extended:
            graph.sites = graph.sites.renamed(self._now)
            regions: dict[int, Any] = {}
            for node in self.graph.nodes:
                if REPLACES in node.meta:
                    node.meta[REPLACES] = self._now(node.meta[REPLACES]) or node.meta[REPLACES]
                if REGION in node.meta:
                    region = node.meta[REGION]
                    y = self._now(region.y) or region.y
                    if y != region.y:
                        node.meta[REGION] = regions.setdefault(id(region), dataclasses.replace(region, y=y))
        graph.module.recompile()

    def traced(
        self, key: object, function: Callable[..., object], values: Sequence[object], what: str, where: str
    ) -> Any:
        """The program of a function of fake tensors; of one key and such values it is traced once.

        Raises:
            PeftfxError: it is one of some sizes alone.
        """
        shapes = [(v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for v in values]
        full = _whole((key, shapes))
        if full not in self._traces:
            self._traces[full] = trace(function, _apart(values), what, where)
        return self._traces[full]

    def _now(self, name: str, what: str = "") -> str:
        """What stands for a node of this name, in this field of a call, by its name; empty where nothing does."""
        known = self._became if what == "op" else {**self._became, **self._extended}
        while name in known:
            node = known[name]
            if node is None:
                return ""
            name = node.name
        return name


@dataclass(frozen=True)
class Cursor:
    """A place in a graph where nodes are made, and what they are made with.

    Attributes:
        rewriter: of the graph.
        place: the node ahead of which they stand.
        like: a node of the module whose code they are; None for no module's.
        tags: `REGION` and such.
    """

    rewriter: Rewriter = field(repr=False)
    place: fx.Node
    like: fx.Node | None
    tags: Mapping[str, object]

    def call(self, target: Any, *args: Any, value: object = _COMPUTED, **kwargs: Any) -> fx.Node:
        """A call of an operator; its value is computed, or given where the operator is known to keep one."""
        graph = self.rewriter.graph
        with graph.inserting_before(self.place):
            node = graph.call_function(target, args, kwargs)
        return self._made(node, _computed(target, args, kwargs) if value is _COMPUTED else value)

    def copy(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node], *, anew: bool = False) -> fx.Node:
        """A copy of a node that reads these in the place of its operands; its value is the same, or computed `anew`."""
        graph = self.rewriter.graph
        with graph.inserting_before(self.place):
            made = graph.node_copy(node, lambda n: operands.get(n, n))
        value = _computed(made.target, made.args, made.kwargs) if anew else node.meta.get("val")
        return self._made(made, value, node if self.like is None else self.like)

    def splice(self, program: fx.GraphModule, operands: Sequence[fx.Node | None]) -> Any:
        """The nodes of a program, on these operands in the place of its inputs; gives what it returns."""
        inputs = program.graph.find_nodes(op="placeholder")
        mapped: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
        for node in program.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], mapped.__getitem__)
            if node.op != "placeholder":
                mapped[node] = self.copy(node, mapped)
        raise AssertionError("a program without an output")

    def trace(
        self,
        function: Callable[..., object],
        *operands: fx.Node | None,
        key: object = None,
        what: str = "",
        where: str = "",
    ) -> Any:
        """What a plain torch function makes of these nodes' values, as nodes; traced once for each key and signature.

        Args:
            function: of as many tensors as there are operands; None stays None.
            key: equal for functions that compute the same.
            what: names the function in errors.
            where: the place in the model, for errors.
        """
        values = [None if n is None else n.meta["val"] for n in operands]
        name = what or getattr(function, "__name__", "")
        return self.splice(self.rewriter.traced(key or function, function, values, name, where), operands)

    def _made(self, node: fx.Node, value: object, like: fx.Node | None = None) -> fx.Node:
        source = self.like if like is None else like
        code = {} if source is None else {key: source.meta[key] for key in _CODE if key in source.meta}
        node.meta = {"val": value, **code, **_keyed(self.tags)}
        return node


def program_of(
    inputs: Sequence[fx.Node], body: Iterable[fx.Node], outputs: Sequence[fx.Node], *, single: bool = False
) -> fx.Graph:
    """A graph of its own of some nodes, as a function of the values of others; `single` returns no tuple."""
    rewriter = Rewriter(fx.Graph())
    last, copies = None, dict[fx.Node, fx.Node]()
    for node in inputs:
        last = copies[node] = rewriter.placeholder(node.name, node.meta.get("val"), last)
    for node in body:
        if node not in copies:
            copies[node] = rewriter.end().copy(node, copies)
    made = [copies[node] for node in outputs]
    rewriter.graph.output(made[0] if single else tuple(made))
    return rewriter.graph


def values_of(arguments: Any) -> Any:
    """Arguments with the nodes among them, however deep, as the values that they were captured with."""
    return fx.node.map_arg(arguments, lambda node: node.meta["val"])


def _apart(values: Sequence[object]) -> list[object]:
    """Values of which no two are one tensor: nodes of one program, put in twice, share theirs, and a trace tells inputs
    apart by identity alone.
    """
    found: list[object] = []
    for value in values:
        known = isinstance(value, torch.Tensor) and any(value is other for other in found)
        found.append(torch.ops.aten.alias.default(value) if known else value)
    return found


def _computed(target: Any, args: Any, kwargs: Any) -> object:
    return target(*values_of(args), **values_of(kwargs))


def _keyed(tags: Mapping[str, object]) -> dict[str, object]:
    return {f"peftfx_{name}": value for name, value in tags.items()}


def _whole(value: object) -> str:
    """A key as text that tells all of it: what users are shown of a site or a method is shorter."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if f.repr)
        value = (type(value).__qualname__, *((f.name, getattr(value, f.name)) for f in fields))
    if isinstance(value, Mapping):
        value = ("mapping", *value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_whole, value))})"
    return repr(value)
