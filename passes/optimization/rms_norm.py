"""Fuse RMS norms that a model's code spells out into `aten.rms_norm`."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.graph.rewriter import Rewriter
from peftfx.passes.rewriting.matching import (
    ADDS,
    MULS,
    either_way,
    has_axes,
    in_dtype_of,
    operand,
    peel,
    replace,
    same_size,
)

aten = torch.ops.aten


def fuse_norm(rewriter: Rewriter, node: fx.Node) -> bool:
    """Fuse `weight * x / sqrt(mean(x^2) + eps)` over the last axis. Return whether the node was replaced."""
    if node.target not in MULS:
        return False
    for weight, scaled in either_way(node):
        normed = peel(scaled, aten._to_copy.default)
        if not has_axes(weight, ndim=1) or normed.target not in MULS:
            continue
        for x, inverse in either_way(normed):
            eps = _mean_square(inverse, x)
            if eps is None or not same_size(weight, 0, x, -1) or not (scaled is normed or _is_cast(x, scaled)):
                continue
            plain = x if scaled is normed else operand(x)
            if node.meta["val"].dtype != plain.meta["val"].dtype:
                continue
            own = in_dtype_of(rewriter, node, weight)
            replace(rewriter, node, aten.rms_norm.default, plain, [weight.meta["val"].shape[0]], own, eps)
            return True
    return False


def _mean_square(inverse: fx.Node, x: fx.Node) -> float | None:
    """Return the epsilon of `rsqrt(mean(x^2, -1) + epsilon)`, or None."""
    if inverse.target is not aten.rsqrt.default:
        return None
    total = operand(inverse)
    if total.target not in ADDS or total.kwargs or not isinstance(total.args[1], (int, float)):
        return None
    mean = operand(total)
    if mean.target is not aten.mean.dim or list(mean.args[1:]) != [[-1], True]:
        return None
    square = operand(mean)
    squares = square.target is aten.pow.Tensor_Scalar and square.args == (x, 2)
    return float(total.args[1]) if squares or (square.target in MULS and square.args == (x, x)) else None


def _is_cast(wide: fx.Node, narrowed: fx.Node) -> bool:
    """Say whether `wide` casts a value to a wider dtype, and `narrowed` is cast back to the value's dtype."""
    plain = operand(wide) if wide.target is aten._to_copy.default else None
    return plain is not None and plain.meta["val"].dtype == narrowed.meta["val"].dtype
