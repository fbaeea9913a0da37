"""Add keys and values beside an attention's own, given as nodes of the graph."""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx

from peftfx.contract.attention import attend_beside
from peftfx.graph.graph import Graph
from peftfx.passes.adaptation.attention import leaving, unstack
from peftfx.passes.slots.layer import Layers
from peftfx.sites.site import HeadedSite


def join_beside(
    graph: Graph,
    layers: Layers,
    site: HeadedSite,
    index: int,
    keys: fx.Node,
    values: fx.Node,
    shown: fx.Node | None = None,
) -> None:
    """Add the attention over extra keys and values to an attention's output, like `AttentionMethod`s do.

    Args:
        graph: the graph that has the attention.
        layers: the layers of the graph.
        site: the site of the attention, with its calls in this graph.
        index: the number of the call.
        keys, values: [key/value heads, tokens, features], or with a first axis for the rows of the batch.
        shown: [rows, tokens], which tokens each row has; None if all.
    """
    heads, call = site.heads, site.calls[index]
    output = graph.sites.weights_by_path.get(heads.output)
    y = leaving(site, output, index, layers.nodes, {}) if heads.packed else layers.nodes[call.y]
    plain = dataclasses.replace(heads, key="", value="", weight="", output="")
    alike = dataclasses.replace(site, path="", layer=None, calls=(), heads=plain)

    def attend(query: Tensor, y: Tensor, keys: Tensor, values: Tensor, *shown: Tensor) -> Tensor:
        added = attend_beside(alike, unstack(query, plain), keys, values, *shown)
        if heads.packed:
            return y + added.transpose(1, 2).reshape(y.shape).to(y.dtype)
        return y + added.reshape(y.shape).to(y.dtype)

    arguments = [layers.nodes[call.x], y, keys, values, *([] if shown is None else [shown])]
    users = list(y.users)
    at = layers.rewriter.after(y)
    result = at.trace(attend, *arguments, key=("beside", alike), what="what stands beside it", where=site.path)
    layers.rewriter.replace(y, result, users)
