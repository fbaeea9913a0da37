"""DeltaMethod: an update that is added to the weight, whatever it is computed from."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.method import Base, Op, Params, WeightMethod
from peftfx.sites.site import Site


class DeltaMethod(WeightMethod):
    """A weight method that says what it adds: `forward` is `y + op(x, delta)`, and `fold` is `W + delta`."""

    @abstractmethod
    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """What is added to a weight, in the weight's shape."""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        delta = self.delta(site, base.weight, p)
        return (y + op(x.to(delta.dtype), delta)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight + self.delta(site, base.weight, p), base.bias)


def dropped_rows(delta: Tensor, rank_dropout: float, module_dropout: float, *, rescaled: bool = True) -> Tensor:
    """LyCORIS's dropout of an update in training: of its rows, and of all of it at once."""
    if rank_dropout:
        kept = (torch.rand(delta.shape[0], device=delta.device) > rank_dropout).to(delta.dtype)
        kept = kept / kept.mean() if rescaled else kept
        delta = delta * kept.view(-1, *(1,) * (delta.ndim - 1))
    if module_dropout:
        delta = delta * (torch.rand(1, device=delta.device) > module_dropout).to(delta.dtype)
    return delta


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """An input behind a method's dropout."""
    return F.dropout(x, probability, training=True) if training and probability else x
