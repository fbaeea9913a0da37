"""The search, in a graph, for the modules where an adapter's placements can act, or for the reason why none can.

A module hosts a weight method if it computes only the site's operation: the module and the operation have the same
input and the same output. Some modules compute more and call the forward of torch's own layer for the operation, as
embeddings that are scaled or that count positions do. There the method acts at the output of that layer's forward. An
adapter with any other placement gets an obstacle, and its calls run a graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType

from torch import Tensor, fx, nn

from peftfx.adapters.adapter import Adapter
from peftfx.analysis.dataflow import FUSED_ATTENTION, op_name
from peftfx.analysis.running import LAYERS
from peftfx.analysis.weight_ops import module_path
from peftfx.bases.guests import own_modules
from peftfx.contract.override import Override
from peftfx.contract.placement import (
    AttentionPlacement,
    PatternPlacement,
    Placement,
    SequencePlacement,
    WeightPlacement,
    owner_of,
)
from peftfx.errors import PeftfxError
from peftfx.graph.capturing.described_values import names_in
from peftfx.graph.graph import BASE, Graph
from peftfx.hosting.regions import Regions
from peftfx.hosting.seats import AttentionSeat, CopySeat, FoldSeat, PatternSeat, Seat, Seating, TextSeat, WeightSeat
from peftfx.passes.adaptation.attention import leaving
from peftfx.passes.rewriting.site_op import bind
from peftfx.quantisation.coded import Coded
from peftfx.sites.site import EXPERTS, Site, WeightSite
from peftfx.twins.offloaded import OWN_FORWARD
from peftfx.views.entry import VirtualTokens

_FUSES = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  #: classes that may compute without calling their layers


class Unhostable(Exception):
    """The reason why a placement cannot act inside a module."""


def seat(graph: Graph, adapter: Adapter, obstacles: Mapping[str, str]) -> Seating:
    """Return the seats of an adapter in the modules of a graph's base, or the obstacle.

    Args:
        graph: a graph of the base, or of its twin.
        adapter: the adapter.
        obstacles: the reasons why modules cannot host any adapter, by the modules' paths.
    """
    finder = _Finder(graph, obstacles)
    try:
        copies = [seat for override in adapter.overrides for seat in finder.copies(override)]
        placed = [seat for placement in adapter.placements for seat in finder.seats(placement)]
    except Unhostable as obstacle:
        return Seating(obstacle=str(obstacle))
    rows = {(c.path, c.name) for c in copies if isinstance(c, CopySeat) and c.override.rows}
    for found in placed:
        if (found.path, getattr(found, "name", "weight")) in rows:
            return Seating(obstacle=f"{found.path}: rows of its weight are trained, and all of it is adapted")
    return Seating((*copies, *placed), dearer=finder.dearer)


class _Finder:
    """The finder of seats in one graph."""

    def __init__(self, graph: Graph, obstacles: Mapping[str, str]) -> None:
        self.graph, self.base, self.obstacles = graph, graph.base, obstacles
        self.dearer = ""  #: why a module would make a copy of a weight, where a graph makes none
        self.nodes = {node.name: node for node in graph.nodes()}
        self.regions = Regions(graph)
        self.weights = graph.sites.weights_by_path
        self.attentions = {site.path: site for site in graph.sites.attentions}
        self.modules = dict(own_modules(self.base, remove_duplicate=False))
        self.called: dict[int, set[str]] = {}
        for path in graph.sites.called & self.modules.keys():
            self.called.setdefault(id(self.modules[path]), set()).add(path)
        self.readers: dict[int, list[fx.Node]] = {}
        for node in graph.nodes():
            if node.op == "get_attr" and str(node.target).startswith(f"{BASE}."):
                self.readers.setdefault(id(graph.get(str(node.target))), []).extend(node.users)

    @functools.singledispatchmethod
    def seats(self, placement: Placement) -> Sequence[Seat]:
        """Return where one placement acts; its copies are found by `copies`."""
        return ()

    @seats.register
    def _(self, placement: WeightPlacement) -> Sequence[Seat]:
        return [self.weight(placement)]

    @seats.register
    def _(self, placement: AttentionPlacement) -> Sequence[Seat]:
        return [self.attention(placement)]

    @seats.register
    def _(self, placement: PatternPlacement) -> Sequence[Seat]:
        return [self.pattern(placement)]

    @seats.register
    def _(self, placement: SequencePlacement) -> Sequence[Seat]:
        entry = placement.method.entry(self.base, placement.site)
        return [TextSeat(entry.embedding, placement)] if isinstance(entry, VirtualTokens) else ()

    def host(self, path: str) -> nn.Module:
        """Return the module at a path, if it has only this path and its forward runs whenever its weight is used."""
        module = self.modules.get(path)
        if module is None:
            raise Unhostable(f"{path}: a bare parameter, of no module of its own")
        if len(self.called.get(id(module), ())) > 1:
            raise Unhostable(f"{path}: one module under several names")
        above = (self.modules.get(path[:i]) for i, letter in enumerate(path) if letter == ".")
        fusing = next((m for m in above if isinstance(m, _FUSES)), None)
        if fusing is not None:
            raise Unhostable(f"{path}: a {type(fusing).__name__} does not always call it")
        if path in self.obstacles:
            raise Unhostable(f"{path}: {self.obstacles[path]}")
        forward = vars(module).get("forward")  # the package `kernels` may have set the class's own on the module
        is_own = forward is None or getattr(forward, "__func__", None) is type(module).forward
        if not is_own and not hasattr(module, OWN_FORWARD):
            raise Unhostable(f"{path}: its forward was set on the module itself")
        return module

    def site(self, path: str) -> WeightSite:
        """Return the site of a weight, as this graph runs the site."""
        if path not in self.weights:
            raise Unhostable(f"{path}: the call that the model was transformed with does not run it")
        return self.weights[path]

    def weight(self, placement: WeightPlacement) -> WeightSeat | FoldSeat:
        """Return where a weight method acts: at a module's output, or in a parameter that a module reads."""
        try:
            return self.output(placement)
        except Unhostable as obstacle:
            if not placement.method.target_parameters and placement.site.kind != EXPERTS:
                raise
            self.dearer = self.dearer or str(obstacle)
            return self.parameter(placement)

    def parameter(self, placement: WeightPlacement) -> FoldSeat:
        """Return the module that reads a parameter into which a method is folded."""
        site = self.site(placement.site.path)
        tensor = self.graph.get(site.weight)
        owners = {path: name for path, m in self.modules.items() if (name := _name_of(m, tensor)) is not None}
        if len(owners) != 1:
            raise Unhostable(f"{site.path}: it is a parameter of {len(owners)} modules")
        ((path, name),) = owners.items()
        readers = {module_path(user) for user in self.readers.get(id(tensor), ())}
        if others := sorted(readers - {path}):
            raise Unhostable(f"{others[0] or 'the model'}: it reads a tensor of another module, {site.path}")
        self.refuse_copy(path, name, tensor)
        return FoldSeat(path, name, placement)

    def refuse_copy(self, path: str, name: str, tensor: Tensor, *, alone: bool = True) -> None:
        """Refuse to give a module another tensor in place of its own one, where it would not read that."""
        module = self.modules[path]
        if alone and len(self.called.get(id(module), ())) > 1:
            raise Unhostable(f"{path}: one module under several names")
        if isinstance(tensor, Coded):
            raise Unhostable(f"{path}: its {name} is quantised, and a trained copy of it is not")
        if any(_holds(value, tensor) for value in vars(module).values()):
            raise Unhostable(f"{path}: it keeps a list of its parameters")

    def output(self, placement: WeightPlacement) -> WeightSeat:
        """Return the module at whose output a weight method acts."""
        path = placement.site.path
        module, site = self.host(path), self.site(placement.site.path)
        if module._parameters.get("weight") is not self.graph.get(site.weight):
            raise Unhostable(f"{path}: its weight is another module's")
        if site.kind == EXPERTS:
            raise Unhostable(f"{path}: experts' weights, of which its code reads some at a time")
        operation = bind(self.nodes[site.calls[0].op], site)
        whole = all(self.is_whole(site, i) for i in range(len(site.calls)))
        if not whole and not all(self.is_inner(module, site, i) for i in range(len(site.calls))):
            raise Unhostable(f"{path}: its module computes more than the operation on its weight")
        return WeightSeat(path, placement, operation, self.bias(module, site), inner=not whole)

    def is_whole(self, site: Site, index: int) -> bool:
        """Return whether a call of the module computes only the site's operation."""
        call = site.calls[index]
        region = self.regions.around(site.path, self.nodes[call.op])
        x, y = self.nodes[call.x], self.nodes[call.y]
        entering = set() if x.op == "get_attr" else {x}  # Swin V2's layers of positions read a table, which is stored
        return region is not None and region.inputs == entering and region.outputs <= {y}

    def is_inner(self, module: nn.Module, site: Site, index: int) -> bool:
        """Return whether the module's forward calls the forward of torch's layer for the site's operation."""
        layer = torch_layer_of(type(module))
        call = site.calls[index]
        op = self.nodes[call.op]
        inside = self.regions.around(site.path, op) is not None
        own = layer is not None and type(module).forward is not layer.forward and _calls_forward(type(module), layer)
        return inside and own and call.y == call.op and self.nodes[call.x] in op.all_input_nodes

    def bias(self, module: nn.Module, site: Site) -> str | None:
        """Return the name of a site's bias in its module, or None."""
        if site.bias is None:
            return None
        tensor = self.graph.get(site.bias)
        name = next((name for name, own in module._parameters.items() if own is tensor), None)
        if name is None:
            raise Unhostable(f"{site.path}: its bias is another module's")
        return name

    def attention(self, placement: AttentionPlacement) -> AttentionSeat:
        """Return where an attention method acts."""
        path, heads, method = placement.site.path, placement.site.heads, placement.method
        self.host(path)
        site = self.attentions.get(path)
        if site is None:
            raise Unhostable(f"{path}: the call that the model was transformed with does not run it")
        for layer in {heads.key, heads.value}:
            self.host(layer)
            if not all(self.is_whole(self.site(layer), i) for i in range(len(self.site(layer).calls))):
                raise Unhostable(f"{layer}: its module computes more than the operation on its weight")
        behind = method.is_behind(placement.site)
        for index, call in enumerate(site.calls):
            op = self.nodes[call.op]
            region = self.regions.around(path, op)
            if op_name(op) != FUSED_ATTENTION or call.y != call.op or region is None:
                raise Unhostable(f"{path}: it does not call torch's fused attention")
            if sum(op_name(node) == FUSED_ATTENTION for node in region.nodes) > 1:
                raise Unhostable(f"{path}: it calls torch's fused attention more than once")
            if behind:
                try:
                    last = leaving(site, self.weights.get(heads.output), index, self.nodes, {})
                except PeftfxError as error:
                    raise Unhostable(f"{path}: {error.what}") from error
                if region.outputs != {last}:
                    raise Unhostable(f"{path}: more leaves it than what the attention gives")
        return AttentionSeat(path, placement, behind)

    def pattern(self, placement: PatternPlacement) -> PatternSeat:
        """Return where a pattern method acts: at a module that computes the pattern's match and nothing else."""
        path = placement.site.path
        site = next((s for s in self.graph.sites.patterns if s.path == path), None)
        if site is None:
            raise Unhostable(f"{path}: the call that the model was transformed with does not run it")
        module = path.removesuffix(f".{site.pattern}.{path.rpartition('.')[2]}")
        if module not in self.modules:  # a match at the model's root is in no module that could host the method
            raise Unhostable(f"{path}: no module below the model computes what the pattern {site.pattern} does")
        self.host(module)
        for call in site.calls:
            region = self.regions.around(module, self.nodes[call.y])
            if region is None or region.inputs != {self.nodes[call.x]} or region.outputs != {self.nodes[call.y]}:
                raise Unhostable(f"{path}: no module computes what the pattern {site.pattern} does, and nothing else")
        if len(site.calls) != len(self.regions.of(module)):
            raise Unhostable(f"{path}: the module computes something else in other calls")
        return PatternSeat(module, placement)

    def copies(self, override: Override) -> Iterator[CopySeat]:
        """Yield the modules that read an adapter's copy in place of their own tensor."""
        within = f"{override.module}." if override.module else ""
        tensor = getattr(*owner_of(self.base.get_submodule(override.module), override.name))
        owners = {path: name for path, m in self.modules.items() if (name := _name_of(m, tensor)) is not None}
        inside = {path: name for path, name in owners.items() if f"{path}.".startswith(within)}
        others = owners.keys() - inside.keys()
        for user in self.readers.get(id(tensor), ()):
            path = module_path(user)
            if path not in owners and (others or not f"{path}.".startswith(within)):
                raise Unhostable(f"{path or 'the model'}: it reads a tensor of another module, {override.name}")
        for path, name in inside.items():
            self.refuse_copy(path, name, tensor, alone=bool(override.module))
            yield CopySeat(path, name, override)


def torch_layer_of(own: type[nn.Module]) -> type[nn.Module] | None:
    """Return torch's own layer that a class of modules derives from, or None."""
    return next((layer for layer in LAYERS if issubclass(own, layer)), None)


def _calls_forward(own: type[nn.Module], layer: type[nn.Module]) -> bool:
    """Return whether code of a class, or of those between it and torch's layer, may call `super().forward`.

    The forward of a class without such code, as one with `F.linear(x, self.weight)`, passes the layer's own by.
    """
    values = [value for owner in own.__mro__[: own.__mro__.index(layer)] for value in vars(owner).values()]
    functions = [inspect.unwrap(value) for value in values if isinstance(value, FunctionType)]
    return any({"super", "forward"} <= set(names_in(function.__code__)) for function in functions)


def _name_of(module: nn.Module, tensor: Tensor) -> str | None:
    held = (*module._parameters.items(), *module._buffers.items())
    return next((name for name, own in held if own is tensor), None)


def _holds(value: object, tensor: Tensor) -> bool:
    """Return whether a module's attribute is a list of tensors that contains this tensor."""
    return isinstance(value, list | tuple) and any(item is tensor for item in value)
