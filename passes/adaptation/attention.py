"""Insert an attention method into a graph: its projections are new calls of sites, its result joins the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from peftfx.adapters.adapter import Adapter
from peftfx.analysis.weight_ops import module_path
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import settings_of
from peftfx.contract.placement import AttentionPlacement
from peftfx.errors import PeftfxError
from peftfx.graph.graph import ADAPTERS
from peftfx.graph.rewriter import REGION
from peftfx.passes.adaptation.weight import apply_at
from peftfx.passes.base import Region
from peftfx.passes.rewriting.site_op import weight_and_bias
from peftfx.passes.rewriting.splice import Splicer
from peftfx.sites.blocks import Block
from peftfx.sites.site import Call, HeadedSite, Heads, Part, Site, WeightSite

aten = torch.ops.aten


def join(splicer: Splicer, placement: AttentionPlacement) -> int:
    """Splice an attention method in at each call of its attention. Return the number of calls."""
    method, path, heads = placement.method, placement.site.path, placement.site.heads
    site = next((s for s in splicer.graph.sites.attentions if s.path == path), None)
    if site is None:  # this view does not run the attention
        return 0
    splicer.called(site)
    first, named = splicer.nodes[site.calls[0].op], type(method).__name__
    params = splicer.parameters(placement, splicer.name, splicer.adapter, first)
    region = splicer.region(placement, splicer.name, first, params)
    weights = {
        name: weight_and_bias(splicer.sites[name], splicer.sites[name].calls[0], splicer.nodes)[0]
        for name in _layers(heads)
    }
    at = splicer.at(first, first, region)
    x = at.trace(
        *_reads(method, params, weights[heads.key]), key=("reads", settings_of(method)), what=named, where=path
    )
    made = {name: _project(splicer, splicer.sites[name], x, first, region) for name in _layers(heads)}
    for index, call in enumerate(site.calls):
        _join_at(splicer, placement, call, index, [made[heads.key], made[heads.value]], params)
    return len(site.calls)


def _layers(heads: Heads) -> list[str]:
    return list(dict.fromkeys((heads.key, heads.value)))


def _reads(
    method: AttentionMethod, params: dict[str, fx.Node], weight: fx.Node
) -> tuple[Callable[..., Tensor], fx.Node, *tuple[fx.Node, ...]]:
    """Return a function of nodes that computes the input of the projections, in the dtype of their `weight`."""

    def reads(weight: Tensor, *given: Tensor) -> Tensor:
        read = method.reads(dict(zip(params, given, strict=True)))
        return read if read.dtype == weight.dtype else read.to(weight.dtype)

    return reads, weight, *params.values()


def _project(splicer: Splicer, site: WeightSite, x: fx.Node, before: fx.Node, region: Region) -> fx.Node:
    """Add a call of a linear site on `x`, with all adapters placed at the site, and return the call's output."""
    weight, bias = weight_and_bias(site, site.calls[0], splicer.nodes)
    at = splicer.at(before, splicer.nodes[site.calls[0].op], region)
    if site.transposed:
        op = at.call(aten.matmul.default, x, weight)
        y = op if bias is None else at.call(aten.add.Tensor, op, bias)
    else:
        op = y = at.call(aten.linear.default, x, weight, *(() if bias is None else (bias,)))
    call = Call(x.name, op.name, y.name)
    splicer.nodes |= {node.name: node for node in (x, op, y)}
    splicer.sites[site.path] = dataclasses.replace(site, calls=(*site.calls, call))
    weights = splicer.graph.sites.weights_by_path
    sites = (splicer.sites[s.path] if weights.get(s.path) is s else s for s in splicer.graph.sites)
    splicer.graph.sites = dataclasses.replace(splicer.graph.sites, items=tuple(sites))
    for (name, _), placed in splicer.placed.get(site.path, {}).items():
        adapter = splicer.graph.module.get_submodule(f"{ADAPTERS}.{name}")
        assert isinstance(adapter, Adapter)
        apply_at(splicer, placed, call, name, adapter)
    return y


def _join_at(
    splicer: Splicer,
    placement: AttentionPlacement,
    call: Call,
    index: int,
    projected: Sequence[fx.Node],
    params: dict[str, fx.Node],
) -> None:
    method, site, heads = placement.method, placement.site, placement.site.heads
    behind = method.is_behind(site)
    output = splicer.sites.get(heads.output)
    anchor = leaving(site, output, index, splicer.nodes, splicer.latest) if behind else splicer.nodes[call.y]
    y = splicer.latest.get(anchor.name, anchor)
    query = splicer.latest.get(call.x, splicer.nodes[call.x])
    arguments = [query, y, *(splicer.latest.get(n.name, n) for n in projected), *params.values()]
    own, names = anonymous(site), list(params)

    def attend(query: Tensor, y: Tensor, keys: Tensor, values: Tensor, *given: Tensor) -> Tensor:
        p = dict(zip(names, given, strict=True))
        return attended(method, own, query, y, (keys, values), p, training=splicer.graph.training)

    region = splicer.region(placement, splicer.name, anchor, params)
    users = list(y.users)
    key, named = ("attend", method, own, behind, names), type(method).__name__
    result = splicer.at(y.next, y, region).trace(attend, *arguments, key=key, what=named, where=site.path)
    splicer.replace(y, result, users)


def anonymous(site: HeadedSite) -> HeadedSite:
    """Return an attention as its method sees it, without what distinguishes it from similar attentions."""
    heads = dataclasses.replace(site.heads, key="", value="", weight="", output="")
    return dataclasses.replace(site, path="", layer=None, calls=(), heads=heads)


def attended(
    method: AttentionMethod,
    site: HeadedSite,
    query: Tensor,
    y: Tensor,
    projected: tuple[Tensor, Tensor],
    p: Mapping[str, Tensor],
    *,
    training: bool,
) -> Tensor:
    """Apply a method to `y`: the attention's output for `query`, or the output of its module if the method acts there.

    `projected` are the outputs of the attention's key and value layers for the method's `reads`, [1, n, rows].
    """
    heads, behind = site.heads, method.is_behind(site)
    key = split_heads(projected[0], heads.key_rows, heads.kept)
    value = split_heads(projected[1], heads.value_rows, heads.kept)
    output = y.unflatten(-1, (heads.count, -1)).transpose(1, 2) if behind else unstack(y, heads)
    new = method.attend(site, unstack(query, heads), output, key, value, p, training)
    return new.transpose(1, 2).reshape(y.shape) if behind else new.reshape(y.shape)


def leaving(
    site: Site, output: Site | None, index: int, nodes: Mapping[str, fx.Node], latest: Mapping[str, fx.Node]
) -> fx.Node:
    """Return the node whose value leaves an attention's module: its last layer's output, after any further steps there.

    Args:
        site: the site of the attention.
        output: the layer that reads the attention's output.
        index: the number of the call.
        nodes: the nodes of the graph, by name.
        latest: the nodes that have replaced others, by the names of the replaced nodes.
    """
    if output is None or len(output.calls) <= index:
        what = "no layer of this attention reads what it gives"
        raise PeftfxError(what, site.path, "use a method that acts on weights, as LoRA")
    node = nodes[output.calls[index].y]
    while True:
        users = list(latest.get(node.name, node).users)
        if len(users) != 1 or users[0].op != "call_function" or REGION in users[0].meta:
            return node
        path = module_path(users[0])
        if path != site.path and not path.startswith(f"{site.path}."):
            return node
        (node,) = users


def split_heads(y: Tensor, rows: tuple[tuple[int, int], ...], heads: int) -> Tensor:
    """Cut the given `rows` of a layer's output [1, n, rows of the layer] into heads: [heads, n, features]."""
    own = Block.of(Part("", rows), y.shape[-1]).take(y, -1)
    return own.squeeze(0).unflatten(-1, (heads, own.shape[-1] // heads)).transpose(0, 1)


def unstack(x: Tensor, heads: Heads) -> Tensor:
    """Reshape a value to [batch, heads, length, features]. It may have batch and heads in one axis, or no heads."""
    if x.ndim == 4:
        return x
    return x.unflatten(0, (-1, heads.count)) if heads.stacked else x.unsqueeze(1)
