"""Replace complex numbers, which ONNX lacks, by pairs of reals. Some models rotate queries with complex numbers.

A complex value [...] becomes a real value [..., 2]. The operators that convert pairs to complex numbers and back are
removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from peftfx.graph.rewriter import Cursor, Rewriter

_aten = torch.ops.aten
_PRODUCTS = {_aten.mul.Tensor, _aten.mul.Scalar}
_SAME = {_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.contiguous.default}
_CASTS = {_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device}
_ALONG = {_aten.slice.Tensor, _aten.unsqueeze.default, _aten.select.int}


def pair_complex(rewriter: Rewriter) -> None:
    """Replace complex numbers by pairs, in place. Unknown operators stay, and are refused later."""
    pairs: dict[fx.Node, fx.Node] = {}
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function":
            continue
        at = rewriter.before(node)
        if node.target is _aten.view_as_real.default and node.args[0] in pairs:
            rewriter.replace(node, pairs[node.args[0]])  # type: ignore[index]
        elif _is_complex(node):
            made = _paired(node, pairs, at)
            if made is not None:
                pairs[node] = made


def _is_complex(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def _paired(node: fx.Node, pairs: dict[fx.Node, fx.Node], at: Cursor) -> fx.Node | None:
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
    own = pairs.get(args[0]) if args and isinstance(args[0], fx.Node) else None
    if own is None:
        return None
    if target in _SAME or target in _CASTS:
        return own if node.meta["val"].dtype == args[0].meta["val"].dtype else None  # type: ignore[union-attr]
    if target in _ALONG:
        axis = args[1] if len(args) > 1 else 0
        assert isinstance(axis, int)
        return at.call(target, own, axis - 1 if axis < 0 else axis, *args[2:])  # type: ignore[arg-type]
    return None


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
