"""Fuse norms, rotary embeddings and attentions into ONNX's own operators, each of which is one kernel in ONNX Runtime.

`RMSNormalization`, `RotaryEmbedding` and `Attention` are standard operators of opset 23, so the graph is not tied to a
provider. `torch.onnx.ops` computes them in torch, too, so a fused graph can be run and compared like any other graph.
Code that does not match exactly is not changed.

https://onnx.ai/onnx/operators/onnx__Attention.html, ...__RotaryEmbedding.html, ...__RMSNormalization.html
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.onnx.ops  # registers torch.ops.onnx
from torch import fx

from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult
from peftfx.passes.optimization.cleanup import Cleanup
from peftfx.passes.optimization.flat_heads import flatten_heads, input_sizes
from peftfx.passes.optimization.prefixed_cache import split_prefix
from peftfx.passes.optimization.rms_norm import fuse_norm
from peftfx.passes.optimization.rotary import fuse_rotary
from peftfx.passes.rewriting.matching import has_axes, pair, unrepeated

OPSET = 23  #: the first version of ONNX's operators that has these operators
FUSED = ("Attention", "RotaryEmbedding", "RMSNormalization")
aten, onnx = torch.ops.aten, torch.ops.onnx


@dataclass(frozen=True)
class Fuse(Pass):
    """Replace computations by the fused operators, and drop values that are then unused.

    The calls of fused sites are removed, so adapters have to be inserted before this pass.
    """

    preserves = True
    requires = ("inference",)

    def __call__(self, graph: Graph) -> PassResult:
        result = graph.clone()
        rewriter, halves = Rewriter(result.module.graph), dict[fx.Node, fx.Node]()
        sizes = input_sizes(rewriter.graph)
        changed = 0
        for node in list(result.nodes()):
            if getattr(node.meta.get("val"), "dtype", None) == torch.float64:
                continue  # ONNX's RotaryEmbedding, and ONNX Runtime's Attention, have no float64
            fused = fuse_norm(rewriter, node) or fuse_rotary(rewriter, node, halves)
            changed += fused or _fuse_attention(rewriter, node, sizes)
        rewriter.close(result)
        return PassResult(Cleanup()(result).graph if changed else graph, changed)


def has_norms(graph: Graph) -> bool:
    """Say whether a graph has norms that are one operator: those of `torch.nn.RMSNorm`, or fused ones."""
    norms = (node.meta["val"] for node in graph.nodes() if node.target is aten.rms_norm.default)
    return any(norm.dtype != torch.float64 for norm in norms)


def _fuse_attention(rewriter: Rewriter, node: fx.Node, sizes: Mapping[str, fx.Node]) -> bool:
    """Fuse an attention over a cache: past and new keys and values, repeated for groups of heads."""
    if node.target is not aten.scaled_dot_product_attention.default or not has_axes(node, ndim=4):
        return False
    query, key, value, mask, *more = (*node.args, node.kwargs.get("attn_mask"))
    if any(more) or node.kwargs.get("dropout_p") or node.kwargs.get("is_causal") or not isinstance(mask, fx.Node):
        return False
    grown = [unrepeated(x) for x in (key, value)]  # type: ignore[arg-type]
    # If the operator had a prefix and a cache as its past, it would return both, and the cache would be copied again.
    apart = all(split_prefix(rewriter, x) for x in grown)
    read = (*grown, mask) if apart else _over_cache(grown, mask, node)
    if read is None:
        return False
    scale = node.kwargs.get("scale")
    at, olds = rewriter.before(node), (node, *grown)
    call = at.call(onnx.Attention.opset23, query, *read, **({} if scale is None else {"scale": scale}))
    rewriter.revalue(call, (*(old.meta["val"] for old in olds), call.meta["val"][3]))
    replaced = olds[:1] if apart else olds
    outputs = [at.call(operator.getitem, call, i) for i in range(len(replaced))]
    for old, new in zip(replaced, outputs, strict=True):
        rewriter.replace(old, new, [user for user in old.users if user > call])
    rewriter.erase(node)  # its schema says that it draws random numbers, so it would stay
    flatten_heads(rewriter, call, sizes)
    return True


def _over_cache(grown: Sequence[fx.Node], mask: fx.Node, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return what an attention reads of a past and of new keys and values, if the operator can return the cache."""
    pairs = [found for x in grown if _is_kept(x, node) and (found := pair(x, (-2, 2))) is not None]
    if len(pairs) != 2 or not all(has_axes(x, ndim=4) for found in pairs for x in found):
        return None  # a cache that is created when first filled starts without axes
    (past_key, new_key), (past_value, new_value) = pairs
    return new_key, new_value, mask, past_key, past_value


def _is_kept(node: fx.Node, attention: fx.Node) -> bool:
    """Say whether a value is used after an attention, like a cache, and before it only by the attention.

    The fused operator returns such a value. A prefix that only the attention reads is not a cache: ONNX Runtime always
    returns the cache.
    """
    before = [user for user in node.users if user <= attention]
    return len(before) < len(node.users) and all(_leads_to(user, attention) for user in before)


def _leads_to(node: fx.Node, attention: fx.Node) -> bool:
    """Say whether a node's only users lead to an attention, so that the fused operator can replace it, too."""
    while node is not attention:
        if len(node.users) != 1 or node > attention:
            return False
        (node,) = node.users
    return True
