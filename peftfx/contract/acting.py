"""`adapted` computes a site's output under a weight method, by the same arithmetic in graphs and in modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftfx.contract.completeness import asking, refuse_forward_output, refuse_forward_shape
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.placement import WeightPlacement, part_of
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Block, turned
from peftfx.sites.site import Site


class Acting(NamedTuple):
    """A weight method at one place, without the place's path.

    Attributes:
        method: the method, as configured for the place.
        site: the site as the method sees it, without its path, so that one trace serves all sites of the same
            signature.
        block: the rows of a fused weight that the method acts on; None for all rows.
        transposed: whether the weight is stored [in, out].
    """

    method: WeightMethod
    site: Site
    block: Block | None
    transposed: bool

    @staticmethod
    def of(placement: WeightPlacement) -> Acting:
        """Return the method, site and rows of `placement`, without the site's path."""
        site = dataclasses.replace(placement.view, path="")
        return Acting(placement.method, site, placement.block, placement.site.transposed)

    def base(self, weight: Tensor, bias: Tensor | None) -> Base:
        """Return the stored `weight` and `bias` as the method sees them: [out, in], and only the block's rows."""
        return part_of(Base(turned(weight, self.transposed), bias), self.block, self.site.rows_axis)


def adapted(
    acting: Acting,
    p: Params,
    op: Op,
    x: Tensor,
    y: Tensor | None,
    stored: tuple[Tensor, Tensor | None],
    under: Sequence[tuple[Acting, Params]] = (),
    *,
    training: bool,
) -> Tensor:
    """Return the output that a method makes from the input `x` and from the output `y` of all that acts under it.

    Args:
        acting: the method.
        p: the method's parameters.
        op: the site's own operation.
        x, y: the site's input and output; `y` is None where the method does not read the output (`WeightMethod.reruns`,
            `replaces`).
        stored: the site's weight and bias, in their stored layout.
        under: the methods that act at the site already, which this method runs again (`WeightMethod.reruns`).
        training: whether dropout is on.
    """
    base, block = acting.base(*stored), acting.block
    p = _alike(acting.method, p, x)

    def again(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is not base.weight:  # the methods under this one do not act on that weight
            what = (
                f"{type(acting.method).__name__} computes this {acting.site.kind} with a weight of its "
                "own, and another adapter acts there already"
            )
            raise PeftfxError(what, acting.site.role, "merge the other one first, or put this one first")
        y = op(x, *acting._replace(block=None).base(*stored))
        for other, q in under:
            y = adapted(other, q, op, x, y, stored, training=training)
        return y if block is None else block.take(y, row_dim(acting.site))

    run: Op = again if under else op
    assert block is None or y is not None
    own, where = y if y is None or block is None else block.take(y, row_dim(acting.site)), acting.site.role
    with asking(acting.method, "forward", where):
        rows = acting.method.forward(acting.site, run, x, own, base, p, training)  # type: ignore[arg-type]
    if own is not None:
        refuse_forward_output(acting.method, where, rows, own)
    elif acting.site.kind == "linear":  # the output's shape of other layers is unknown unless the output is computed
        refuse_forward_shape(acting.method, where, rows, (*x.shape[:-1], base.weight.shape[0]))
    return rows if y is None or block is None else block.put(y, rows, row_dim(acting.site))


def _alike(method: Method, p: Params, x: Tensor) -> Params:
    """Return parameters in one dtype, the widest, if other code has cast the trained ones and not the constants.

    TRL does so. Torch multiplies numbers of two dtypes in the wider one, and refuses matrices, but for autocast.
    """
    if len({t.dtype for t in p.values()}) == 1 or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return p
    floating = {name: t.dtype for name, t in p.items() if t.is_floating_point()}
    if len(set(floating.values())) < 2 or not any(method.is_constant(name, p[name]) for name in floating):
        return p
    widest = functools.reduce(torch.promote_types, floating.values())
    return {name: t.to(widest) if name in floating else t for name, t in p.items()}


def overlap(one: WeightPlacement, other: WeightPlacement) -> bool:
    """Return whether the placements `one` and `other` of one site act on common rows."""
    return None in (one.part, other.part) or one.part == other.part


def row_dim(site: Site) -> int:
    """Return which dimension of a site's output stands for the rows of its weight."""
    return -1 if site.kind != "conv" else 1 - len(site.shape)
