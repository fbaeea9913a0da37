"""Replace complex numbers, which ONNX lacks, by pairs of reals. Some models rotate queries with complex numbers.

A complex value [...] becomes a real value [..., 2]. The operators that convert pairs to complex numbers and back are
removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from peftfx.graph.graph import DERIVED, Graph
from peftfx.graph.recipe import Get
from peftfx.graph.rewriter import Cursor, Rewriter

_aten = torch.ops.aten
_PRODUCTS = {_aten.mul.Tensor, _aten.mul.Scalar}
_SAME = {_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.contiguous.default}
_CASTS = {_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device}
_ALONG = {_aten.slice.Tensor, _aten.unsqueeze.default, _aten.select.int, _aten.index_select.default, _aten.flip.default}
_SHAPED = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_CONJUGATES = {_aten.conj.default, _aten._conj.default, _aten.conj_physical.default}
_JOINS = {_aten.cat.default, _aten.stack.default}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}


@dataclass(frozen=True)
class Paired:
    """The recipe of a tensor of complex numbers as pairs of reals.

    Attributes:
        target: the tensor's name in the graph.
    """

    target: str

    def evaluate(self, get: Get) -> Tensor:
        """Return the pairs, [..., 2]."""
        return torch.view_as_real(get(self.target).detach().resolve_conj()).contiguous()


def pair_tensors(graph: Graph) -> Graph:
    """Return a copy that reads the model's complex tensors as pairs; the graph itself, if the model has none."""
    if not any(node.op == "get_attr" and _is_complex(node) for node in graph.nodes()):
        return graph
    result = graph.clone()
    rewriter = Rewriter(result.module.graph)
    first = next(node for node in result.nodes() if node.op != "get_attr")
    for node in list(result.nodes()):
        if node.op == "get_attr" and _is_complex(node):
            name = str(node.target).partition(".")[2]
            result.derived[name] = Paired(str(node.target))
            pairs = rewriter.attribute(f"{DERIVED}.{name}", torch.view_as_real(node.meta["val"]))
            rewriter.replace(node, rewriter.before(first).call(_aten.view_as_complex.default, pairs))
            rewriter.erase(node)
    rewriter.close(result)
    return result


def pair_complex(rewriter: Rewriter) -> None:
    """Replace complex numbers by pairs, in place. Unknown operators stay, and are refused later."""
    pairs: dict[fx.Node, fx.Node] = {}
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function":
            continue
        at = rewriter.before(node)
        if node.target is _aten.view_as_real.default and node.args[0] in pairs:
            rewriter.replace(node, pairs[node.args[0]])
        elif _is_complex(node):
            made = _paired(node, pairs, at)
            if made is not None:
                pairs[node] = made


def _is_complex(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def _paired(node: fx.Node, pairs: dict[fx.Node, fx.Node], at: Cursor) -> fx.Node | None:
    """Return the pairs that stand for a node's complex numbers, or None if its operator is unknown."""
    target, args = node.target, node.args
    if target is _aten.view_as_complex.default:
        return args[0] if isinstance(args[0], fx.Node) else None
    if target in (_aten.polar.default, _aten.complex.default):
        first, second = args
        if target is _aten.polar.default:
            turned = (at.call(trigonometric.default, second) for trigonometric in (_aten.cos, _aten.sin))
            first, second = (at.call(_aten.mul.Tensor, first, value) for value in turned)
        return at.call(_aten.stack.default, [first, second], -1)
    if target in _PRODUCTS:
        return _product(args[0], args[1], pairs, at)
    if target in _SUMS and len(args) == 2 and not node.kwargs and all(_is_complex(side) for side in args):
        sides = [pairs.get(side) for side in args]  # type: ignore[arg-type]
        return None if None in sides else at.call(target, *sides)
    if target in _JOINS:
        return _joined(node, pairs, at)
    own = pairs.get(args[0]) if args and isinstance(args[0], fx.Node) else None
    return None if own is None else _of_one(node, own, at)


def _of_one(node: fx.Node, own: fx.Node, at: Cursor) -> fx.Node | None:
    """Return the pairs that an operator makes of its first operand's pairs `own`, or None if it is unknown."""
    target, args = node.target, node.args
    if target in _SAME or target in _CASTS:
        return own if node.meta["val"].dtype == args[0].meta["val"].dtype else None  # type: ignore[union-attr]
    if target in _ALONG:
        axis = args[1] if len(args) > 1 else 0
        return at.call(target, own, _along(axis), *args[2:])
    if target in _SHAPED:
        return at.call(_aten.reshape.default, own, [*args[1], 2])  # type: ignore[misc]
    if target is _aten.expand.default:
        return at.call(target, own, [*args[1], -1])  # type: ignore[misc]
    if target is _aten.permute.default:
        axes = [axis % len(args[1]) for axis in args[1]]  # type: ignore[arg-type, union-attr, operator]
        return at.call(target, own, [*axes, len(axes)])
    if target is _aten.transpose.int:
        return at.call(target, own, _along(args[1]), _along(args[2]))
    if target is _aten.index.Tensor:
        return at.call(target, own, args[1])
    if target is _aten.neg.default:
        return at.call(target, own)
    if target in _CONJUGATES:
        parts = [at.call(_aten.select.int, own, -1, i) for i in (0, 1)]
        return at.call(_aten.stack.default, [parts[0], at.call(_aten.neg.default, parts[1])], -1)
    return None


def _along(axis: Any) -> Any:
    """Return the axes of the pairs that are these axes of the complex numbers."""
    if isinstance(axis, list | tuple):
        return [_along(one) for one in axis]
    return axis - 1 if axis < 0 else axis


def _joined(node: fx.Node, pairs: dict[fx.Node, fx.Node], at: Cursor) -> fx.Node | None:
    items = [pairs.get(item) for item in node.args[0]]  # type: ignore[union-attr, arg-type]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return None if None in items or node.kwargs else at.call(node.target, items, _along(axis))


def _product(one: object, other: object, pairs: dict[fx.Node, fx.Node], at: Cursor) -> fx.Node | None:
    sides: list[Any] = [pairs.get(side) if _is_complex(side) else side for side in (one, other)]  # type: ignore[call-overload]
    if None in sides:
        return None
    if not (_is_complex(one) and _is_complex(other)):
        pair, factor = sides if _is_complex(one) else sides[::-1]
        if isinstance(factor, complex):
            return None
        wide = at.call(_aten.unsqueeze.default, factor, -1) if isinstance(factor, fx.Node) else factor
        return at.call(_aten.mul.Tensor, pair, wide)
    (a, b), (c, d) = ([at.call(_aten.select.int, side, -1, i) for i in (0, 1)] for side in sides)
    ac, bd, ad, bc = (at.call(_aten.mul.Tensor, *pair) for pair in ((a, c), (b, d), (a, d), (b, c)))
    parts = [at.call(_aten.sub.Tensor, ac, bd), at.call(_aten.add.Tensor, ad, bc)]
    return at.call(_aten.stack.default, parts, -1)
