"""DeltaMethod: an update that is added to the weight, whatever it is computed from."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.sites.site import Site


class DeltaMethod(WeightMethod):
    """A weight method that says what it adds: `forward` is `y + op(x, delta)`, and `fold` is `W + delta`."""

    @abstractmethod
    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """What is added to a weight, in the weight's shape."""

    def trained_delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """What is added in training, where something of it is drawn anew in each call."""
        return self.delta(site, weight, p)

    @property
    def replaces(self) -> bool:
        return True

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        delta = (self.trained_delta if training else self.delta)(site, base.weight, p)
        if y is not None:
            return (y + op(x.to(delta.dtype), delta)).to(y.dtype)
        weight, bias = base.weight.to(delta.dtype) + delta, None if base.bias is None else base.bias.to(delta.dtype)
        return in_dtype(op(x.to(delta.dtype), weight, bias), delta.dtype, base.weight.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight + self.delta(site, base.weight, p), base.bias)


def in_dtype(output: Tensor, computed: torch.dtype, own: torch.dtype) -> Tensor:
    """What was computed in one dtype, in the one that the site gives: its own, or autocast's where that was on."""
    return output.to(own) if output.dtype == computed else output


def kept(like: Tensor, dropout: float) -> Tensor:
    """1, or in training and by this chance 0; a number is drawn whatever the chance, as in HF PEFT."""
    return (torch.rand(1, device=like.device) > dropout).to(like.dtype)


def dropped_rows(delta: Tensor, dropout: float, *, rescaled: bool = True) -> Tensor:
    """LyCORIS's dropout of an update's rows in training."""
    if not dropout:
        return delta
    rows = (torch.rand(delta.shape[0], device=delta.device) > dropout).to(delta.dtype)
    rows = rows / rows.mean() if rescaled else rows
    return delta * rows.view(-1, *(1,) * (delta.ndim - 1))


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """An input behind a method's dropout."""
    return F.dropout(x, probability, training=True) if training and probability else x
