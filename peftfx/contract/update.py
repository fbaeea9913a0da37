"""Update: what a method does to a weight, as scales and a low-rank sum. Graphs with slots take this form.

    W' = diag(outer) W diag(inner) + B A        b' = bias

At an embedding `W` is [dim, num], as if each id were a one-hot vector. At a conv `A` is a conv of one group, [r, in,
*kernel], and `B A` its product with `B`, [out, r].

Updates are closed under composition: two updates in turn are again one update. So any number of adapters at a site is
one update, and a graph with inputs for one update serves them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.contract.broadcast import along_columns
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Block
from peftfx.sites.site import Site


@dataclass(frozen=True)
class Update:
    """Scales and a low-rank sum that change a weight. A field that is None changes nothing.

    Attributes:
        inner: [in], a factor of each column.
        outer: [out], a factor of each row of the base's weight.
        a: [r, in], or [r, in, *kernel].
        b: [out, r], with every scale of the method multiplied in.
        bias: [out], which replaces the base's bias.
    """

    inner: Tensor | None = None
    outer: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None

    def then(self, later: Update) -> Update:
        """Return this update followed by the update `later`, as one update."""
        a, b = self.a, self.b
        if a is not None and b is not None:
            a = a if later.inner is None else a * along_columns(later.inner, a, groups=1)
            b = b if later.outer is None else b * later.outer[:, None]
        return Update(
            _both(self.inner, later.inner, torch.mul),
            _both(self.outer, later.outer, torch.mul),
            _both(a, later.a, lambda x, y: torch.cat([x, y], 0)),
            _both(b, later.b, lambda x, y: torch.cat([x, y], 1)),
            self.bias if later.bias is None else later.bias,
        )

    def turned(self) -> Update:
        """Return this update of a weight as an update of the transposed weight. Neither has a bias."""
        a, b = (None if t is None else t.T for t in (self.b, self.a))
        return Update(inner=self.outer, outer=self.inner, a=a, b=b)

    def spread(self, block: Block, rows: int, where: str) -> Update:
        """Return this update of the rows of `block` as an update of a whole weight of `rows` rows.

        Raises:
            PeftfxError: the update scales the input of only these rows.
        """
        if self.inner is not None:
            what = "this scales the input of some rows of a weight, and there is no such scale for the whole weight"
            raise PeftfxError(what, where, "target the whole module, or export the adapter merged")
        outer = None if self.outer is None else block.put(self.outer.new_ones(rows), self.outer, 0)
        b = None if self.b is None else block.put(self.b.new_zeros(rows, self.b.shape[1]), self.b, 0)
        return dataclasses.replace(self, outer=outer, b=b)

    def factors(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Return A and B in the layout of a slot of this site."""
        if self.a is None or self.b is None:
            return None, None
        if site.kind == "conv":
            return self.a, self.b.view(*self.b.shape, *(1,) * (self.a.ndim - 2))
        return self.a.T, self.b.T

    def apply(self, weight: Tensor) -> Tensor:
        """Return the updated weight of a linear layer, [out, in]."""
        weight = weight if self.inner is None else weight * self.inner
        weight = weight if self.outer is None else weight * self.outer[:, None]
        return weight if self.a is None or self.b is None else weight + self.b @ self.a


def _both(x: Tensor | None, y: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return join(x, y)
