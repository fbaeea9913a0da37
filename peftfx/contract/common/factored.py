"""FactoredMethod: a method whose update of a linear weight is the product of two low-rank factors."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.common.delta import dropped
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.sites.site import Site


class FactoredMethod(WeightMethod):
    """A weight method that gives two factors: `forward` is `y + B A drop(x)`, and `fold` is `W + B A`."""

    @abstractmethod
    def factors(self, base: Base, p: Params) -> tuple[Tensor, Tensor]:
        """Return `A` [r, in] and `B` [out, r], with every scale multiplied in."""

    @property
    def input_dropout(self) -> float:
        """The rate of the dropout on the adapter's input in training."""
        return 0.0

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        a, b = self.factors(base, p)
        read = dropped(x, self.input_dropout, training).to(a.dtype)
        return (y + F.linear(F.linear(read, a), b)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        a, b = self.factors(base, p)
        return Update(a=a, b=b)
