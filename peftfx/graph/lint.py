"""Checks that hold for every graph, whatever passes have done to it."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Sequence

from torch import fx, nn

from peftfx.errors import PeftfxError
from peftfx.sites.site import Call, Site

_FAULT = "this is a fault of the pass that made the graph"


def check_order(module: fx.GraphModule) -> None:
    """Check that values are made before they are used, and that names are unique."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in module.graph.nodes:
        early = next((n for n in node.all_input_nodes if n not in seen), None)
        if early is not None:
            raise PeftfxError(f"%{node.name} uses %{early.name} before it is made", node.format_node() or "", _FAULT)
        if node.name in names:
            raise PeftfxError("two nodes have one name", node.name, _FAULT)
        seen.add(node)
        names.add(node.name)


def check_values(module: fx.GraphModule, derived: Container[str]) -> None:
    """Check that every tensor that is read exists, and that every value that is used has its `meta["val"]`.

    Tensors at `derived` targets need not exist, as they may not be computed yet. Nodes that return nothing, and bodies
    of higher-order operators, have no value.
    """
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target not in derived:
            try:
                if isinstance(operator.attrgetter(target)(module), nn.Module):
                    continue
            except AttributeError:
                what = f"%{node.name} reads {target}, and the graph holds no such tensor"
                raise PeftfxError(
                    what, target, "add its holder to the graph's module, or a recipe to `derived`"
                ) from None
        if node.op != "output" and node.users and node.meta.get("val") is None:
            what = f"%{node.name} has no value: its meta has no 'val', the fake tensor that tells its dtype and shape"
            raise PeftfxError(what, node.format_node() or "", "make nodes by `peftfx.graph.rewriter.Rewriter`")


def check_interface(module: fx.GraphModule, inputs: Sequence[object], outputs: int) -> None:
    """Check that there is a placeholder for each input, and a value for each output."""
    places = module.graph.find_nodes(op="placeholder")
    if len(places) != len(inputs):
        what = f"the graph has {len(places)} placeholders, and tells of {len(inputs)} inputs"
        raise PeftfxError(what, ", ".join(node.name for node in places), _FAULT)
    (output,) = module.graph.find_nodes(op="output")
    if len(output.args[0]) != outputs:
        raise PeftfxError(f"the graph returns {len(output.args[0])} values, and tells of {outputs}", "output", _FAULT)


def check_calls(module: fx.GraphModule, sites: Sequence[Site]) -> None:
    """Check that every node that a call of a site names is in the graph."""
    names = {node.name for node in module.graph.nodes}
    for site in sites:
        for call in site.calls:
            lost = next((f"its {what}, %{name}," for what, name in named(call) if name not in names), None)
            if lost is not None:
                what = f"a call of this site names a node that is no longer there: {lost} is not in the graph"
                raise PeftfxError(what, site.path, "erase and replace nodes by `peftfx.graph.rewriter.Rewriter`")


def named(call: Call) -> Iterator[tuple[str, str]]:
    """Return the fields of a call that name a node, with the names."""
    given = {"x": call.x, "op": call.op, "y": call.y, "key": call.key, "value": call.value}
    return ((what, name) for what, name in given.items() if name)
