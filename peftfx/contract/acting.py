"""adapted: what weight methods make of a site's output: the arithmetic that a graph traces, and that modules run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from peftfx.contract.completeness import asking, refuse_forward_output, refuse_forward_shape
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.placement import WeightPlacement
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Block, turned
from peftfx.sites.site import Site


class Acting(NamedTuple):
    """A weight method where it acts.

    Attributes:
        method: as it is at the place.
        site: as the method sees it, without its path: one trace serves every site of a signature.
        block: the rows of a fused weight that it acts on, if not on all.
        transposed: whether the weight is stored [in, out].
    """

    method: WeightMethod
    site: Site
    block: Block | None
    transposed: bool

    @staticmethod
    def of(placement: WeightPlacement) -> Acting:
        """That of a placement."""
        site = dataclasses.replace(placement.view, path="")
        return Acting(placement.method, site, placement.block, placement.site.transposed)

    def base(self, weight: Tensor, bias: Tensor | None) -> Base:
        """The site's tensors, as they are stored, as the method sees them."""
        weight = turned(weight, self.transposed)
        if self.block is None:
            return Base(weight, bias)
        return Base(self.block.take(weight, self.site.rows_axis), None if bias is None else self.block.take(bias, 0))


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
    """What a method makes of `y`, which `op` and all that acts under it made of `x`.

    Args:
        acting: the method.
        p: its parameters.
        op: the site's own operation.
        x, y: its input and output; no output where the method reads none (`WeightMethod.reruns`, `replaces`).
        stored: its weight and bias, as they are stored.
        under: what acts there already, which the method runs again (`WeightMethod.reruns`).
        training: whether dropout is on.
    """
    base, block, dim = acting.base(*stored), acting.block, row_dim(acting.site)

    def again(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is not base.weight:  # what acts under it is not in that weight
            what = (
                f"{type(acting.method).__name__} computes this {acting.site.kind} with a weight of its "
                "own, and another adapter acts there already"
            )
            raise PeftfxError(what, acting.site.role, "merge the other one first, or put this one first")
        y = op(x, *acting._replace(block=None).base(*stored))
        for other, q in under:
            y = adapted(other, q, op, x, y, stored, training=training)
        return y if block is None else block.take(y, dim)

    run: Op = again if under else op
    assert block is None or y is not None
    own, where = y if y is None or block is None else block.take(y, dim), acting.site.role
    with asking(acting.method, "forward", where):
        rows = acting.method.forward(acting.site, run, x, own, base, p, training)  # type: ignore[arg-type]
    if own is not None:
        refuse_forward_output(acting.method, where, rows, own)
    elif acting.site.kind == "linear":  # of other layers nothing tells the output's shape where it is not computed
        refuse_forward_shape(acting.method, where, rows, (*x.shape[:-1], base.weight.shape[0]))
    return rows if y is None or block is None else block.put(y, rows, dim)


def overlap(one: WeightPlacement, other: WeightPlacement) -> bool:
    """Whether two placements of one site act on common rows."""
    return None in (one.part, other.part) or one.part == other.part


def row_dim(site: Site) -> int:
    """Which dimension of a site's output its weight's rows are."""
    return -1 if site.kind != "conv" else 1 - len(site.shape)
