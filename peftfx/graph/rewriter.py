"""Rewriter: the one way to make nodes in a graph, and to replace nodes.

A new node has a value (`meta["val"]`, computed on fake tensors), the module whose code it belongs to, and the tags that
it is made with. A replacement is complete: in operands, in the calls of sites, and in the insertions' record of what
they replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from peftfx.graph.graph import Graph
from peftfx.graph.trace import forgetting_sizes, trace

REGION = "peftfx_region"  #: in `node.meta` of every inserted node: its `Region`
REPLACES = "peftfx_replaces"  #: in `node.meta` of a region's result: the name of the node that it replaced
OVERRIDES = "peftfx_overrides"  #: in `node.meta` of an adapter's tensor: the target of the base's tensor it replaces
_CODE = ("nn_module_stack", "stack_trace")  #: metadata that says whose code a node is
_COMPUTED: Any = object()  #: a default that means: compute the value


class Rewriter:
    """Makes and replaces nodes of one graph.

    Attributes:
        graph: the graph that is rewritten.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._attributes: dict[str, fx.Node] = {}
        self._became: dict[str, fx.Node | None] = {}
        self._extended: dict[str, fx.Node] = {}
        self._traces: dict[str, fx.GraphModule] = {}

    def before(self, node: fx.Node, like: fx.Node | None = None, **tags: object) -> Cursor:
        """Return a cursor before `node`. New nodes count as code of `like`'s module, by default of `node`'s."""
        return Cursor(self, node, node if like is None else like, tags)

    def after(self, node: fx.Node, like: fx.Node | None = None, **tags: object) -> Cursor:
        """Return a cursor after `node`. New nodes count as code of `like`'s module, by default of `node`'s."""
        return Cursor(self, node.next, node if like is None else like, tags)

    def end(self) -> Cursor:
        """Return a cursor at the end, for a program without code of modules."""
        return Cursor(self, self.graph._root, None, {})

    def attribute(self, target: str, value: object, **tags: object) -> fx.Node:
        """Return the `get_attr` node of `target`. A new one is made before the first node of another kind."""
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
        """Make a new input after the node `after`, or as the first of a graph without inputs."""
        place = self.graph._root if after is None else after
        with self.graph.inserting_after(place):
            node = self.graph.placeholder(name)
        node.target = node.name  # fx makes names valid and different: `0_lora_A`, in code, is no name
        node.meta = {"val": value}
        return node

    def tag(self, node: fx.Node, **tags: object) -> None:
        """Add tags to a node that exists already."""
        node.meta.update(_keyed(tags))

    def revalue(self, node: fx.Node, value: object) -> None:
        """Set a node's value, after its inputs have changed."""
        node.meta["val"] = value

    def update(self, node: fx.Node, target: object, *args: Any, **kwargs: Any) -> None:
        """Change a node's operator and arguments, and compute its value again. Its place and users stay."""
        node.target, node.args, node.kwargs = target, args, kwargs  # type: ignore[assignment]
        node.meta["val"] = _computed(target, args, kwargs)

    def replace(self, old: fx.Node, new: fx.Node, users: Collection[fx.Node] | None = None) -> None:
        """Replace the node `old` by `new`, of the same value, for `users`: by default for all users but `new`.

        If `users` is left out, calls and insertions name `new` from now on.
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
        """Let `new`, computed from `old`, take its place for users. The site's operation itself stays `old`."""
        self.replace(old, new, [user for user in old.users if user is not new])
        self._extended[old.name] = new

    def erase(self, node: fx.Node) -> None:
        """Remove a node without users. Calls of sites that name it are removed too, if nothing replaced it."""
        self._became.setdefault(node.name, None)
        if node.op == "get_attr":
            self._attributes.clear()
        self.graph.erase_node(node)

    def close(self, graph: Graph) -> None:
        """End a rewrite: make the calls of the sites and the insertions name the graph's current nodes."""
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
        """Return the program of a function of fake tensors. It is traced once for each key and such values.

        Raises:
            PeftfxError: the program holds only for some sizes.
        """
        shapes = [(v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for v in values]
        full = _whole((key, shapes))
        if full not in self._traces:
            self._traces[full] = trace(function, distinct_tensors(values), what, where)
        return self._traces[full]

    def _now(self, name: str, what: str = "") -> str:
        """Return the name of the node that now stands for `name` in the field `what` of a call, or ""."""
        known = self._became if what == "op" else {**self._became, **self._extended}
        while name in known:
            node = known[name]
            if node is None:
                return ""
            name = node.name
        return name


@dataclass(frozen=True)
class Cursor:
    """A place in a graph where nodes are made, with the module and the tags of new nodes.

    Attributes:
        rewriter: the graph's rewriter.
        place: the node before which new nodes are put.
        like: a node of the module to whose code new nodes belong; None for no module.
        tags: metadata of new nodes, such as `REGION`.
    """

    rewriter: Rewriter = field(repr=False)
    place: fx.Node
    like: fx.Node | None
    tags: Mapping[str, object]

    def call(self, target: Any, *args: Any, value: object = _COMPUTED, **kwargs: Any) -> fx.Node:
        """Make a call of an operator. Its value is computed, or given where the operator keeps a known value."""
        graph = self.rewriter.graph
        with graph.inserting_before(self.place):
            node = graph.call_function(target, args, kwargs)
        return self._made(node, _computed(target, args, kwargs) if value is _COMPUTED else value)

    def copy(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node], *, anew: bool = False) -> fx.Node:
        """Make a copy of a node on other operands. Its value is that of the node, or computed again if `anew`."""
        graph = self.rewriter.graph
        with graph.inserting_before(self.place):
            made = graph.node_copy(node, lambda n: operands.get(n, n))
        value = _computed(made.target, made.args, made.kwargs) if anew else node.meta.get("val")
        return self._made(made, value, node if self.like is None else self.like)

    def splice(self, program: fx.GraphModule, operands: Sequence[fx.Node | None]) -> Any:
        """Copy the nodes of a program onto the operands, in place of its inputs, and return its results."""
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
        """Trace a plain torch function on these nodes' values, once for each key and signature, and insert its nodes.

        Args:
            function: a function of as many tensors as there are operands; an operand that is None stays None.
            key: a key that is equal for functions that compute the same.
            what: the function's name in errors.
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
    """Return a separate graph of some nodes as a function of other nodes' values; `single` returns no tuple."""
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
    """Return arguments with each node in them, at any depth, replaced by its captured value."""
    return fx.node.map_arg(arguments, lambda node: node.meta["val"])


def distinct_tensors(values: Sequence[object]) -> list[object]:
    """Return the values such that no two are the same tensor: a trace would take them for one operand."""
    found: list[object] = []
    for value in values:
        known = isinstance(value, torch.Tensor) and any(value is other for other in found)
        found.append(torch.ops.aten.alias.default(value) if known else value)
    return found


def _computed(target: Any, args: Any, kwargs: Any) -> object:
    args, kwargs = values_of(args), values_of(kwargs)
    # Without the dispatcher, torch's own form of some operators takes no symbols as sizes.
    with forgetting_sizes((args, kwargs)), enable_python_dispatcher():
        return target(*args, **kwargs)


def _keyed(tags: Mapping[str, object]) -> dict[str, object]:
    return {f"peftfx_{name}": value for name, value in tags.items()}


def _whole(value: object) -> str:
    """Return a key as text with all of its fields. The text that users see of a site or a method is shorter."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if f.repr)
        value = (type(value).__qualname__, *((f.name, getattr(value, f.name)) for f in fields))
    if isinstance(value, Mapping):
        value = ("mapping", *value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_whole, value))})"
    return repr(value)
