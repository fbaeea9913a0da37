"""Insert: put adapters into a graph. Each method's `forward` is traced once for each signature and spliced in."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeGuard  # type: ignore[attr-defined]

from peftfx.adapter import Adapter, Placement
from peftfx.capturing import isolated
from peftfx.errors import PeftfxError
from peftfx.graph import ADAPTERS, BASE, Graph
from peftfx.method import WeightMethod
from peftfx.occurrences import module_path
from peftfx.passes.base import (
    OVERRIDES,
    REGION,
    REPLACES,
    Pass,
    PassResult,
    Region,
    attribute,
    attributes_of,
    fake_like,
    results,
)
from peftfx.passes.fill import TARGET, first_operation, trace_virtual
from peftfx.passes.site_op import bind, operands
from peftfx.sites import Call, Site
from peftfx.soft import SequenceMethod

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, eq=False)
class Insert(Pass):
    """Apply an adapter at its placements, at every call of each site, and put its overrides in the base's place.

    Attributes:
        name: the adapter's name: its tensors are read from `adapters.<name>.`.
        adapter: what to insert.
    """

    name: str
    adapter: Adapter

    def __call__(self, graph: Graph) -> PassResult:
        graph = graph.clone()
        splicer = _Splicer(graph, self.name, self.adapter)
        with isolated(graph.base):
            changed = splicer.override() + sum(splicer.insert(p) for p in self.adapter.placements)
        graph.module.recompile()
        return PassResult(graph, changed)


class _Splicer:
    """One insertion in progress: the graph's nodes, what stands for each call's output, and the traces made."""

    def __init__(self, graph: Graph, name: str, adapter: Adapter) -> None:
        self.graph, self.name, self.adapter = graph, name, adapter
        self.fx = graph.module.graph
        self.nodes = {n.name: n for n in graph.nodes()}
        self.sites = {site.path: site for site in graph.sites if site.weight}
        self.attributes = attributes_of(graph)
        self.latest: dict[str, fx.Node] = {}
        self.placed: dict[str, list[Placement]] = {}
        for result in results(graph):
            region = result.meta[REGION]
            self.latest[region.y] = result
            self.placed.setdefault(region.placement.site.path, []).append(region.placement)
        self.traces: dict[str, fx.GraphModule] = {}

    def override(self) -> int:
        """Read the adapter's own tensors where the base's are used inside the overridden modules."""
        wanted: dict[str, list[tuple[str, str]]] = {}
        for override in self.adapter.overrides:
            module = self.graph.base.get_submodule(override.module)
            owner, _, leaf = override.name.rpartition(".")
            tensor = getattr(module.get_submodule(owner), leaf)
            for target in self._targets_by_tensor.get(id(tensor), ()):
                wanted.setdefault(target, []).append((override.module, override.key))
        changed = 0
        for target, choices in wanted.items():
            node = self.attributes[target]
            for user in list(node.users):
                path = module_path(user)
                key = next((k for m, k in choices if m == "" or path == m or path.startswith(f"{m}.")), None)
                if key is not None:
                    own = self._attribute(f"{ADAPTERS}.{self.name}.{key}", node.meta["val"])
                    own.meta[OVERRIDES] = target
                    user.replace_input_with(node, own)
                    changed += 1
        return changed

    @functools.cached_property
    def _targets_by_tensor(self) -> dict[int, list[str]]:
        """The names under which the graph reads each of the base's tensors, by identity: a tied one has several."""
        found: dict[int, list[str]] = {}
        for target in self.attributes:
            if target.startswith(f"{BASE}."):
                found.setdefault(id(self.graph.get(target)), []).append(target)
        return found

    def insert(self, placement: Placement) -> int:
        """Splice a placement in at each call of its site in this view; returns how many there were."""
        if isinstance(placement.method, SequenceMethod):
            return self._fill(placement, placement.method)
        site = self.sites.get(placement.site.path)  # a view may not run it: `inputs_embeds` passes an embedding by
        if site is None:
            return 0
        placed = self.placed.setdefault(site.path, [])
        others = [p for p in placed if None in (p.part, placement.part) or p.part == placement.part]
        if others and not all(p.method.composes for p in (*others, placement)):
            what = f"{type(placement.method).__name__} as configured cannot share a site with another adapter"
            raise PeftfxError(what, site.path, "disable the other adapter, or merge it first")
        placed.append(placement)
        for call in site.calls:
            self._insert_at(placement, call)
        return len(site.calls)

    def _fill(self, placement: Placement, method: SequenceMethod) -> int:
        """Put a soft prompt into the hole of the entry that this view was captured through."""
        hole = self.attributes[TARGET]
        params = self.adapter.params(placement)
        prefix = f"{ADAPTERS}.{self.name}.{placement.key}"
        fake = [fake_like(hole.meta["val"], t) for t in params.values()]
        traced = trace_virtual(method, hole.meta["val"], list(params), fake, training=self.graph.training)
        arguments: list[fx.Node | None] = [
            self._attribute(f"{prefix}.{n}", v) for n, v in zip(params, fake, strict=True)
        ]
        region = Region(self.name, placement, hole.name, tuple((n, f"{prefix}.{n}") for n in params))
        users = list(hole.users)
        with self.fx.inserting_before(first_operation(self.fx)):
            anchor = self.fx.create_node("call_function", _anchor)
        result = self._splice(traced, arguments, anchor, hole, region)
        for user in users:
            user.replace_input_with(hole, result)
        result.meta[REPLACES] = hole.name
        self.latest[hole.name] = result
        return 1

    def _insert_at(self, placement: Placement, call: Call) -> None:
        op = self.nodes[call.op]
        x, y = (self.latest.get(name, self.nodes[name]) for name in (call.x, call.y))
        weight, bias = operands(placement.site, call, self.nodes)
        params = self.adapter.params(placement)
        prefix = f"{ADAPTERS}.{self.name}.{placement.key}"
        fake = [fake_like(y.meta["val"], t) for t in params.values()]
        values = [x.meta["val"], y.meta["val"], weight.meta["val"], None if bias is None else bias.meta["val"], *fake]
        traced = self._trace(placement, op, list(params), values)
        arguments = [x, y, weight, bias]
        arguments += [self._attribute(f"{prefix}.{n}", v) for n, v in zip(params, fake, strict=True)]
        region = Region(self.name, placement, call.y, tuple((n, f"{prefix}.{n}") for n in params))
        users = list(y.users)
        with self.fx.inserting_after(y):
            anchor = self.fx.create_node("call_function", _anchor)
        result = self._splice(traced, arguments, anchor, y, region)
        for user in users:
            user.replace_input_with(y, result)
        result.meta[REPLACES] = y.name
        self.latest[call.y] = result

    def _trace(self, placement: Placement, op: fx.Node, names: list[str], values: list[object]) -> fx.GraphModule:
        site = dataclasses.replace(placement.view, path="", layer=None, weight="", bias=None, calls=())
        fixed = [a for a in op.args if not isinstance(a, fx.Node)]
        shapes = [(v.dtype, v.shape) if isinstance(v, Tensor) else v for v in values]
        key = repr((placement.method, site, placement.block, op.target, fixed, names, shapes))
        if key not in self.traces:
            self.traces[key] = trace(placement, op, names, values, training=self.graph.training)
        return self.traces[key]

    def _splice(
        self, traced: fx.GraphModule, arguments: list[fx.Node | None], anchor: fx.Node, y: fx.Node, region: Region
    ) -> fx.Node:
        """Copy a trace to where the anchor is, which goes; its result stands for `y`."""
        mapped = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), arguments, strict=True))
        stack = y.meta.get("nn_module_stack")
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                (result,) = fx.node.map_arg(node.args, lambda n: mapped[n])
                break
            with self.fx.inserting_before(anchor):
                new = self.fx.node_copy(node, lambda n: mapped[n])
            new.meta = {"val": node.meta.get("val"), "nn_module_stack": stack, REGION: region}
            mapped[node] = new
        self.fx.erase_node(anchor)
        return result

    def _attribute(self, target: str, value: object) -> fx.Node:
        return attribute(self.fx, target, value, self.attributes)


def trace(
    placement: Placement, op: fx.Node, names: list[str], values: list[object], *, training: bool
) -> fx.GraphModule:
    """A method's forward at one call as a graph of (x, y, weight, bias, *params)."""
    bound, block, method = bind(op, placement.site), placement.block, placement.method
    assert isinstance(method, WeightMethod)
    site = dataclasses.replace(placement.view, path="")  # one trace serves every site of this signature

    def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        base, p = placement.base(weight, bias), dict(zip(names, params, strict=True))
        if block is None:
            return method.forward(site, bound, x, y, base, p, training)
        rows = method.forward(site, bound, x, block.take(y, _row_dim(site)), base, p, training)
        return block.put(y, rows, _row_dim(site))

    mode = detect_fake_mode([v for v in values if isinstance(v, Tensor)])
    guards = mode.shape_env.guards if mode is not None and mode.shape_env is not None else []
    before = len(guards)
    traced = make_fx(forward, tracing_mode="symbolic", pre_dispatch=True)(*values)
    for guard in guards[before:]:
        if _binds(guard):
            what = f"{type(placement.method).__name__} branches on a shape: {guard.expr}"
            raise PeftfxError(what, placement.site.path, "write it without the branch: one trace serves all sizes")
    traced.graph.eliminate_dead_code()
    return traced


def _binds(guard: ShapeGuard) -> bool:
    """Whether a guard makes the trace one of some sizes alone.

    torch's own operators compare sizes too, to pick a kernel or a memory format: their inequalities bind nothing, an
    equality of theirs does (a broadcast against a fixed size).
    """
    place = guard.sloc.framework_loc
    inside = str(getattr(place, "filename", place)).startswith(_TORCH)
    return not inside or isinstance(guard.expr, sympy.Eq)


def _row_dim(site: Site) -> int:
    """Which dimension of a site's output its weight's rows are."""
    return -1 if site.kind != "conv" else 1 - len(site.shape)


def _anchor() -> None:
    """Marks a place while nodes are inserted before it; never runs."""
