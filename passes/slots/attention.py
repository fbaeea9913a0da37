"""join_beside: keys and values that stand beside an attention's own, given as nodes of the graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from peftfx.contract.attention import attend_beside
from peftfx.graph.graph import Graph
from peftfx.graph.trace import trace
from peftfx.passes.adaptation.attention import leaving, unstack
from peftfx.sites.site import Site


def join_beside(
    graph: Graph,
    nodes: Mapping[str, fx.Node],
    site: Site,
    index: int,
    keys: fx.Node,
    values: fx.Node,
    shown: fx.Node | None = None,
) -> None:
    """Add to what leaves an attention, in place, where `AttentionMethod`s do.

    Args:
        graph: that has it.
        nodes: of the graph, by name.
        site: the attention, its calls those of this graph.
        index: which call.
        keys, values: [heads that are kept, tokens, features], or such for each row of the batch.
        shown: [rows, tokens], which of them there are.
    """
    heads, call = site.heads, site.calls[index]
    assert heads is not None
    output = next((s for s in graph.sites if s.weight and s.path == heads.output), None)
    y = leaving(site, output, index, nodes, {}) if heads.packed else nodes[call.y]

    def attend(query: Tensor, y: Tensor, keys: Tensor, values: Tensor, *shown: Tensor) -> Tensor:
        added = attend_beside(site, unstack(query, heads), keys, values, *shown)
        if heads.packed:
            return y + added.transpose(1, 2).reshape(y.shape).to(y.dtype)
        return y + added.reshape(y.shape).to(y.dtype)

    arguments = [nodes[call.x], y, keys, values, *([] if shown is None else [shown])]
    traced = trace(attend, [n.meta["val"] for n in arguments], "what stands beside it", site.path)
    mapped = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), arguments, strict=True))
    users = list(y.users)
    with graph.module.graph.inserting_before(y.next):
        result = graph.module.graph.graph_copy(traced.graph, mapped)
    for old, new in mapped.items():
        if old.op != "placeholder":
            new.meta = {"val": old.meta.get("val"), "nn_module_stack": y.meta.get("nn_module_stack")}
    assert isinstance(result, fx.Node)
    for user in users:
        user.replace_input_with(y, result)
