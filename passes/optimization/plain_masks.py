"""Remove masks from attention calls if the mask hides nothing, or only the future. torch's kernels need none then.

A captured graph holds for all calls, so it always has the mask, and it repeats keys and values for each head of a
group. In a call whose mask hides nothing, or only the future, the graph can call torch as the model's own code would:
with `is_causal`, and with grouped heads by `enable_gqa`. This keeps less memory for the backward pass, and allows flash
attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from peftfx.analysis.dataflow import ancestors
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.optimization.dead_code import sweep
from peftfx.passes.rewriting.matching import has_axes, same_size, unrepeated

EVERYTHING, CAUSAL = "everything", "causal"
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_WIDEST = 256  #: the largest width of heads that torch's kernels for groups take
_MOST = 500  #: the most nodes that may compute a mask


def kind_of(mask: Tensor) -> str:
    """Say what a mask shows: `everything`, the past only (`causal`), or something else, which is an empty string.

    Args:
        mask: [..., queries, keys]. Either bool, or floats that are added to the scores: 0 shows, and the lowest number
            of the dtype, or less, hides.
    """
    shown = mask if mask.dtype == torch.bool else mask == 0
    if bool(shown.all()):
        return EVERYTHING
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        return ""
    past = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if not bool((shown == past).all()):
        return ""
    hidden = ~shown if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    return CAUSAL if bool((hidden | past).all()) else ""


def masks_of(graph: Graph) -> list[fx.Node]:
    """Return the masks of a graph's fused attentions that are computed only from its inputs."""
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes():
        mask = _bound(node).get("attn_mask")
        if isinstance(mask, fx.Node) and mask not in found and _same_without(node):
            found[mask] = sources(mask, graph) is not None
    return [mask for mask, follows in found.items() if follows]


def sources(mask: fx.Node, graph: Graph) -> set[fx.Node] | None:
    """Return the nodes that compute a mask, including it. None if they read weights, are random, or have a gradient."""
    found = set[fx.Node]()
    for node in ancestors(mask):
        found.add(node)
        if not _is_plain(node, graph) or len(found) > _MOST:
            return None
    return found


def without_masks(graph: Graph, kinds: Mapping[str, str]) -> Graph:
    """Return the graph for calls in which these masks, by the names of their nodes, are of these kinds.

    The graph is only for running: the nodes that computed the masks are removed.
    """
    result = graph.clone()
    rewriter = Rewriter(result.module.graph)
    for node in list(result.nodes()):
        bound = _bound(node)
        mask = bound.get("attn_mask")
        if isinstance(mask, fx.Node) and mask.name in kinds:
            _unmask(rewriter, node, bound, causal=kinds[mask.name] == CAUSAL)
    sweep(rewriter)
    rewriter.close(result)
    return result


def _unmask(rewriter: Rewriter, node: fx.Node, bound: Mapping[str, object], *, causal: bool) -> None:
    query, key, value = (bound[name] for name in _NAMES[:3])
    options = {name: bound[name] for name in ("scale", "enable_gqa") if name in bound}
    plain = [unrepeated(x) for x in (key, value)]  # type: ignore[arg-type]
    width = plain[0].meta["val"].shape[-1]
    equal = same_size(plain[0], -1, plain[1], -1) and same_size(plain[0], 1, plain[1], 1)
    if plain[0] is not key and plain[1] is not value and equal and isinstance(width, int) and width <= _WIDEST:
        (key, value), options["enable_gqa"] = plain, True
    given = (query, key, value, None, bound.get("dropout_p", 0.0), causal)
    rewriter.replace(node, rewriter.before(node).call(_ATTENTION, *given, value=node.meta["val"], **options))
    rewriter.erase(node)


def _bound(node: fx.Node) -> dict[str, object]:
    """Return the arguments of a fused attention whose mask could be removed, by name; empty for other nodes."""
    if node.target is not _ATTENTION:
        return {}
    bound: dict[str, object] = {**dict(zip(_NAMES, node.args)), **node.kwargs}
    return {} if bound.get("is_causal") else bound


def _same_without(node: fx.Node) -> bool:
    """Say whether an attention keeps its shape without its mask. A mask can bring another batch size."""
    query, _, value = node.args[:3]
    if not all(isinstance(x, fx.Node) and has_axes(x, 4) for x in (query, value)) or not has_axes(node, 4):
        return False
    return all(same_size(node, axis, query, axis) for axis in range(3)) and same_size(node, -1, value, -1)  # type: ignore[arg-type]


def _is_plain(node: fx.Node, graph: Graph) -> bool:
    """Say whether a node's value is computed from inputs and constants, and is the same each time."""
    if node.op == "placeholder":
        value = node.meta.get("val")
        return not (isinstance(value, Tensor) and value.is_floating_point())
    if node.op == "get_attr":
        target = str(node.target)
        return not target.startswith(f"{ADAPTERS}.") and _is_buffer(graph, target)
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and not node.is_impure() and not (schema is not None and schema.is_mutable)


def _is_buffer(graph: Graph, target: str) -> bool:
    try:
        value = graph.get(target)
    except AssertionError:  # a subprogram, such as for a region
        return False
    return not isinstance(value, nn.Parameter) and not value.requires_grad
