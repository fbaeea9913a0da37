"""splice: graphs of methods put into a graph: traced once for each signature, tagged, and read in a node's place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import sympy
import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeGuard  # type: ignore[attr-defined]
from torch.utils._sympy.functions import Max

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import Method, WeightMethod
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.passes.base import REGION, REPLACES, Region, attribute, attributes_of, fake_like, results

_TORCH = str(Path(torch.__file__).parent)


class Splicer:
    """One insertion in progress: the graph's nodes, what stands for each call's output, and the traces made.

    Attributes:
        nodes: by name.
        latest: what stands for a node's value now, by the node's name.
        weighted: the same, of what acts on weights alone: it comes before what joins their output from elsewhere.
        instead: the result that took the place of a node, by the node's name.
        placed: what was placed at each site, with the name of its adapter, in order.
    """

    def __init__(self, graph: Graph, name: str, adapter: Adapter) -> None:
        self.graph, self.name, self.adapter = graph, name, adapter
        self.fx = graph.module.graph
        self.nodes = {n.name: n for n in graph.nodes()}
        self.sites = {site.path: site for site in graph.sites if site.weight}
        self.attributes = attributes_of(graph)
        self.latest: dict[str, fx.Node] = {}
        self.weighted: dict[str, fx.Node] = {}
        self.instead: dict[str, fx.Node] = {}
        self.placed: dict[str, dict[tuple[str, str], Placement]] = {}
        for result in results(graph):
            region = result.meta[REGION]
            self.latest[region.y] = self.instead[result.meta[REPLACES]] = result
            if isinstance(region.placement.method, WeightMethod):
                self.weighted[region.y] = result
                self.note(region.adapter, region.placement)
        self.traces: dict[str, fx.GraphModule] = {}

    def note(self, adapter: str, placement: Placement) -> None:
        """Remember that a placement of this adapter acts at its site."""
        self.placed.setdefault(placement.site.path, {})[adapter, placement.key] = placement

    def parameters(self, placement: Placement, name: str, adapter: Adapter, anchor: fx.Node) -> dict[str, fx.Node]:
        """The nodes that read a placement's parameters, by their names."""
        keys = adapter.keys(placement).items()
        like = anchor.meta["val"]
        return {n: self.attribute(f"{ADAPTERS}.{name}.{key}", fake_like(like, adapter.get(key))) for n, key in keys}

    def region(self, placement: Placement, name: str, y: fx.Node, params: Mapping[str, fx.Node]) -> Region:
        """The tag of what a placement adds at `y`."""
        return Region(name, placement, y.name, tuple((n, str(node.target)) for n, node in params.items()))

    def replace(self, y: fx.Node, result: fx.Node, users: Iterable[fx.Node]) -> None:
        """Let these users of `y` read a region's result in its place."""
        for user in users:
            user.replace_input_with(y, result)
        later = self.instead.pop(y.name, None)
        if later is not None:  # it joined `y` from elsewhere, and now joins the result
            later.meta[REPLACES], self.instead[result.name] = result.name, later
        result.meta[REPLACES], self.instead[y.name] = y.name, result
        for name in (y.name, result.meta[REGION].y):
            if self.latest.get(name, y) is y:
                self.latest[name] = result

    def traced(
        self, key: object, function: Callable[..., Tensor], values: Sequence[object], method: Method, where: str
    ) -> fx.GraphModule:
        """The graph of a function of fake tensors, that of an earlier one of this key and these shapes if there is one.

        Raises:
            PeftfxError: it is one of some sizes alone.
        """
        shapes = [(v.dtype, v.shape) if isinstance(v, Tensor) else v for v in values]
        full = repr((key, shapes))
        if full not in self.traces:
            self.traces[full] = trace(function, values, type(method).__name__, where)
        return self.traces[full]

    def splice(
        self,
        traced: fx.GraphModule,
        arguments: Sequence[fx.Node | None],
        *,
        before: fx.Node,
        like: fx.Node,
        region: Region,
    ) -> fx.Node:
        """Copy a trace to before a node, as code of the module that made `like`; gives the node of its result."""
        mapped = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), arguments, strict=True))
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                (result,) = fx.node.map_arg(node.args, lambda n: mapped[n])
                break
            with self.fx.inserting_before(before):
                new = self.fx.node_copy(node, lambda n: mapped[n])
            self.tag(new, node.meta.get("val"), like, region)
            mapped[node] = new
        return result

    def tag(self, node: fx.Node, value: object, like: fx.Node, region: Region) -> None:
        """Mark a node that was added: its value, the module that it belongs to, and its region."""
        node.meta = {"val": value, "nn_module_stack": like.meta.get("nn_module_stack"), REGION: region}

    def attribute(self, target: str, value: object) -> fx.Node:
        """The `get_attr` node for a target."""
        return attribute(self.fx, target, value, self.attributes)


def trace(function: Callable[..., Tensor], values: Sequence[object], name: str, where: str) -> fx.GraphModule:
    """A function of fake tensors as a graph; one that holds for some sizes alone is refused."""
    mode = detect_fake_mode([v for v in values if isinstance(v, Tensor)])
    guards = mode.shape_env.guards if mode is not None and mode.shape_env is not None else []
    before = len(guards)
    graph = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*values)
    for guard in guards[before:]:
        if _binds(guard):
            what = f"{name} branches on a shape: {guard.expr}"
            raise PeftfxError(what, where, "write it without the branch: one trace serves all sizes")
    graph.graph.eliminate_dead_code()
    return graph


def _binds(guard: ShapeGuard) -> bool:
    """Whether a guard makes the trace one of some sizes alone.

    torch's own operators compare sizes too, to pick a kernel or a memory format: their inequalities bind nothing, an
    equality of theirs does (a broadcast against a fixed size), unless it says no more than that a size is at least 1.
    """
    place = guard.sloc.framework_loc
    inside = str(getattr(place, "filename", place)).startswith(_TORCH)
    expr = guard.expr.replace(Max, lambda *sizes: sizes[1] if len(sizes) == 2 and sizes[0] == 1 else Max(*sizes))
    return not inside or isinstance(expr, sympy.Eq)
