"""DeltaMethod: a method that adds an update to a weight. LycorisMethod: the base class of LyCORIS's methods."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.contract.common.low_rank import dense
from peftfx.contract.common.patterns import by_path, pattern_of, refuse_ranks
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site


class DeltaMethod(WeightMethod):
    """A weight method that adds an update: `forward` is `y + op(x, delta)`, and `fold` is `W + delta`."""

    @abstractmethod
    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """Return the update that is added to a weight, in the weight's shape."""

    def trained_delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        """Return the update for a call in training, where a method may draw a random part anew."""
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


@dataclass(frozen=True, kw_only=True)
class LycorisMethod(DeltaMethod):
    """The base class of LyCORIS's methods: ranks and scales by path, two dropouts of the update, conv factors.

    Args:
        r: rank of a product of two factors.
        alpha: numerator of the scale, `alpha / r`.
        rank_dropout: the probability with which each call in training leaves out a row of the update.
        module_dropout: the probability with which a call in training leaves out the whole update.
        use_effective_conv2d: give a conv a core of its kernel's size, and factors for its channels.
        rank_pattern, alpha_pattern: other values of `r` and `alpha` for module paths that match a key.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_ranks(self.r, self.rank_pattern, type(self).__name__)
        if self.rank_dropout == 1:  # the rows that are kept are scaled up, and none would be kept
            hint = f"{type(self).__name__}(rank_dropout=0.05)"
            raise PeftfxError("rank_dropout must be below 1: no row of the update would be left", "rank_dropout", hint)

    @property
    def scaling(self) -> float:
        """The factor that the update is multiplied by, `alpha / r`."""
        return self.alpha / self.r

    def at(self, site: Site) -> Self:
        r = int(by_path(self.rank_pattern, "rank_pattern", site.path, self.r))
        alpha = by_path(self.alpha_pattern, "alpha_pattern", site.path, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        if not training:
            return super().forward(site, op, x, y, base, p, training)
        first, own = next(iter(p.items()))
        keep = kept(own, self.module_dropout)
        if isinstance(x, FakeTensor) or torch.compiler.is_compiling():  # a graph has no branch
            p = {**p, first: own * keep}  # the update is linear in each parameter
        elif not keep:
            return without_gradient(op(x, *base) if y is None else y, p)
        return super().forward(site, op, x, y, base, p, training)

    def gather(self, methods: Mapping[str, Method]) -> Self:
        ranks, alphas = pattern_of(methods, "r", self.r), pattern_of(methods, "alpha", self.alpha)
        return dataclasses.replace(self, rank_pattern=ranks, alpha_pattern=alphas)

    def refuse_conv_update(self, site: Site) -> None:
        """Refuse a conv, whose update has no two factors that a running graph could take.

        Raises:
            PeftfxError: the site is a conv.
        """
        if site.kind != "linear":
            what = f"{type(self).__name__} on a conv cannot be put into a running graph"
            raise PeftfxError(what, site.path, "export the adapter merged")

    def of_weight(self, site: Site, weight: Tensor, update: Tensor) -> Tensor:
        """Return the computed `update`, scaled and in the weight's shape."""
        shape = (*weight.shape[:1], -1, *site.shape[2:]) if site.kind == "conv" else weight.shape
        delta = (update * self.scaling).reshape(shape)
        if delta.shape[1] == weight.shape[1]:
            return delta
        return dense(delta, site.groups)  # another adapter has made the grouped conv dense


def in_dtype(output: Tensor, computed: torch.dtype, own: torch.dtype) -> Tensor:
    """Convert an output computed in dtype `computed` to the site's dtype `own`. Autocast's dtype is left."""
    return output.to(own) if output.dtype == computed else output


def without_gradient(y: Tensor, p: Params) -> Tensor:
    """Return `y` as it is, where these parameters do not act in a call: then they get no gradient, and not zeros.

    An optimizer passes such parameters by. The result still has a gradient, also if nothing else in the model has one.
    """
    return _Aside.apply(y, *p.values())


class _Aside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return y.clone()  # the model's code may change a layer's output in place, and a view here would refuse that

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:
        return (back, *(None,) * ctx.count)


def kept(like: Tensor, dropout: float) -> Tensor:
    """Return 1, or 0 with probability `dropout`. As in HF PEFT, a number is drawn whatever the probability."""
    return (torch.rand(1, device=like.device) > dropout).to(like.dtype)


def dropped_rows(delta: Tensor, dropout: float, *, rescaled: bool = True) -> Tensor:
    """Apply LyCORIS's dropout to an update's rows, in training."""
    if not dropout:
        return delta
    rows = (torch.rand(delta.shape[0], device=delta.device) > dropout).to(delta.dtype)
    rows = rows / rows.mean() if rescaled else rows
    return delta * rows.view(-1, *(1,) * (delta.ndim - 1))


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """Apply a method's dropout to its input `x`, only in training."""
    return F.dropout(x, probability, training=True) if training and probability else x
