"""Heads of attentions: how many heads there are, which rows of which layers are their keys and values, and their scale.

All this is read from the graph. Row numbers are sent from a projection to the attention's keys and values. Factors are
collected between the product of queries and keys and the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.analysis.attentions import Attention
from peftfx.analysis.dataflow import FUSED_ATTENTION, Flow, ancestors, op_name
from peftfx.analysis.facts import Analysis
from peftfx.analysis.rows import RowTracer, as_ranges, hint
from peftfx.analysis.weight_ops import Occurrence
from peftfx.errors import PeftfxError
from peftfx.graph.graph import BASE
from peftfx.sites.blocks import Block, Rows
from peftfx.sites.site import Heads, Part

_STEPS = 4  #: how many layers may be between a query's input and a key's, such as a pooling convolution and its norm


class _Projection(NamedTuple):
    found: Occurrence
    tracer: RowTracer


def read_heads(analysis: Analysis, attention: Attention) -> Heads:
    """Return the heads of a self-attention.

    Raises:
        PeftfxError: the attention is no self-attention, or its keys or values are not the rows of one linear layer,
            head by head.
    """
    shape = attention.query.meta["val"].shape
    if op_name(attention.product) == "einsum" or len(shape) not in (3, 4):
        raise _unclear("its heads do not lie as [batch, heads, length, features]")
    key, value = (_projection(analysis, attention, role) for role in ("key", "value"))
    if not _is_self(analysis, attention, key.found):
        raise _unclear("its keys come from another stream than its queries: it is a cross-attention")
    width, other = _width(key.found), _width(value.found)
    if width != other:
        raise _unclear(f"its keys are made of {width} features and its values of {other}")
    count = hint(shape[1]) if len(shape) == 4 else _stacked(analysis, attention)
    stacked = len(shape) == 3 and count > 1
    turned = op_name(attention.op) != FUSED_ATTENTION
    key_rows, kept = _rows(key, attention.key, count, turned=turned)
    value_rows, also = _rows(value, attention.value, count, turned=False)
    if kept != also:
        raise _unclear(f"it has keys of {kept} heads and values of {also}")
    packed = key.found.op is value.found.op and key.found.op in analysis.flows[attention.query].origins
    return Heads(
        *(count, kept, stacked, _scale(analysis, attention, key)),
        *(key.found.path, value.found.path, key_rows, value_rows),
        weight=key.found.weight,
        width=width,
        packed=packed and key.found.transposed,
        output=_output(analysis, attention),
    )


def _unclear(what: str) -> PeftfxError:
    return PeftfxError(what, "attention", "")


def _projection(analysis: Analysis, attention: Attention, role: str) -> _Projection:
    node = dict(attention.inputs())[role]
    origins = [o for o in analysis.flows[node].origins if o in analysis.owner and o is not attention.op]
    found = [o for origin in origins for o in analysis.owner[origin].occurrences if o.op is origin]
    if len(found) != 1:
        raise _unclear(f"its {role}s come from {len(found) or 'no'} layers that the dataflow sees, not from one")
    if found[0].kind != "linear":
        raise _unclear(f"its {role}s come from a layer of kind {found[0].kind}, not linear")
    if not found[0].weight.startswith(f"{BASE}."):
        raise _unclear(f"its {role}s come from a weight that is not the model's own")
    return _Projection(found[0], analysis.tracer(found[0].op))


def _width(found: Occurrence) -> int:
    return found.shape[0 if found.transposed else 1]


def _is_self(analysis: Analysis, attention: Attention, key: Occurrence) -> bool:
    """Return whether keys are computed from the same values as queries, or from a layer over those values."""
    owners = (analysis.owner.get(o) for o in analysis.flows[attention.query].origins)
    sources = {
        o.x for w in owners if w is not None for o in w.occurrences if o.op in analysis.flows[attention.query].origins
    }
    wanted = {origin for x in sources for origin in analysis.flows[x].origins}
    x = key.x
    for _ in range(_STEPS):
        origins = analysis.flows[x].origins
        if x in sources or (origins and origins.keys() <= wanted):
            return True
        before = [o for origin in origins if origin in analysis.owner for o in analysis.owner[origin].occurrences]
        if len(origins) != 1 or len(before) != 1:
            return False
        x = before[0].x
    return False


def _stacked(analysis: Analysis, attention: Attention) -> int:
    """Return how many heads a query [batch * heads, length, features] has; 1 for [batch, length, features]."""
    origins = [o for o in analysis.flows[attention.query].origins if o in analysis.owner]
    if len(origins) != 1:
        raise _unclear("its queries come from several layers")
    rows = analysis.tracer(origins[0]).rows_at(attention.query)
    size = hint(attention.query.meta["val"].shape[-1])
    if not rows or len(rows) % size:
        raise _unclear("the features of its queries are not those of whole heads")
    return len(rows) // size


def _rows(projection: _Projection, node: fx.Node, heads: int, *, turned: bool) -> tuple[Rows, int]:
    """Return the rows that are keys or values, head by head, and the number of their heads.

    They are looked for at the first token and at the last: behind a cache the first token comes from no layer.
    """
    traced = projection.tracer.numbers_at(node)
    for numbers, token in ((numbers, token) for token in (0, -1) for numbers in traced):
        entries = numbers.transpose(-1, -2) if turned else numbers
        entries = entries[0, :, token] if entries.ndim == 4 else entries[: max(heads, 1), token]
        found = _in_order(entries - 1, heads)
        if found is not None:
            rows, kept = found
            size = projection.found.shape[1 if projection.found.transposed else 0]
            Block.of(Part(node.name, rows), size)
            return rows, kept
    raise _unclear("the rows of its projections do not lie head by head")


def _in_order(entries: Tensor, heads: int) -> tuple[Rows, int] | None:
    """Return the rows and the number of heads of [heads, features] row numbers, or None if not in heads' order."""
    rows = sorted(set(entries.flatten().tolist()))
    kept, rest = divmod(len(rows), entries.shape[1])
    if not rows or rows[0] < 0 or rest or heads % kept:
        return None
    lying = torch.tensor(rows).view(kept, -1)
    spread = lying.repeat_interleave(heads // kept, 0)
    fits = torch.equal(entries, spread) or torch.equal(entries, lying)
    return (as_ranges(set(rows)), kept) if fits else None


def _scale(analysis: Analysis, attention: Attention, key: _Projection) -> float:
    """Return the factor of a query's product with a key. It includes factors by which the model multiplies keys."""
    on_keys = _factor(analysis, key, attention.key, key.found.op, lambda flow: key.found.op in flow.origins)
    if op_name(attention.op) == FUSED_ATTENTION:
        given = attention.op.kwargs.get("scale")
        features = hint(attention.query.meta["val"].shape[-1])
        return on_keys * (features**-0.5 if given is None else _number(given))
    product, logits = attention.product, attention.logits
    assert logits is not None
    on_scores = _factor(analysis, key, logits, product, lambda flow: product in flow.products, strict=True)
    return on_keys * on_scores * _number(product.kwargs.get("alpha", 1.0))


def _factor(
    analysis: Analysis,
    key: _Projection,
    node: fx.Node,
    source: fx.Node,
    comes_from: Callable[[Flow], bool],
    *,
    strict: bool = False,
) -> float:
    """Return the product of the numbers that multiply a value on the way from `source`; `strict` refuses tensors."""
    factor = 1.0
    while node is not source:
        before = next((n for n in node.all_input_nodes if n is source or comes_from(analysis.flows[n])), None)
        if before is None:
            raise _unclear("its scores cannot be followed")
        factor *= _multiplier(key, node, before, strict=strict)
        node = before
    return factor


def _multiplier(key: _Projection, node: fx.Node, before: fx.Node, *, strict: bool) -> float:
    name = op_name(node)
    if name not in ("mul", "multiply", "div", "true_divide"):
        return 1.0
    other = next((a for a in node.args if a is not before), None)
    if isinstance(other, fx.Node):
        if not _is_number(other):
            if strict and any(str(n.target).startswith(f"{BASE}.") for n in ancestors(other)):
                raise _unclear("its scores are scaled by what is learned")
            return 1.0
        other = key.tracer.constant(other)
        if isinstance(other, FakeTensor) or (isinstance(other, Tensor) and other.is_meta):
            raise _unclear("its scale is a tensor without a value")
    number = _number(other)
    return number if name.startswith("mul") else 1.0 / number


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not all(isinstance(n, int) and n == 1 for n in value.shape):
        return False
    return all(n.op != "placeholder" and not _is_parameter(n) for n in ancestors(node))


def _is_parameter(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, Tensor) and bool(value.requires_grad)


def _number(value: object) -> float:
    return float(value.node.hint) if isinstance(value, torch.SymFloat) else float(value)  # type: ignore[arg-type]


def _output(analysis: Analysis, attention: Attention) -> str:
    """Return the path of the first linear layer that reads the attention's output, also through a norm or a gate."""
    readers = (found for found, _ in analysis.readers[attention.op] if found.kind == "linear")
    return next((found.path for found in readers), "")
