"""PEANuT: a small network that computes the update from the weight (Zhong et al. 2024, arXiv:2410.01870).

The update is `s B h(W^T A^T)^T`, with `h` the activation. After it come `depth` encoders and `depth` decoders of size
`r`, each with an activation; a decoder's output and its encoder's input are added. The weight is frozen, so the update
is `B` times a matrix of `r` rows, and has rank `r`, also in graphs with slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError, nearest
from peftfx.sites.site import Site

A, B = "peanut_A", "peanut_B"


@dataclass(frozen=True, kw_only=True)
class PEANuT(WeightMethod):
    """An update of linear weights that a network computes from the weights.

    Args:
        r: the features inside the network.
        depth: the number of encoders, and of decoders.
        act_fn: the activation, by its name in transformers.
        scaling: the factor of the update.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.PEANuT(r=8, depth=1))
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "PEANUT"
    # Fused projections are adapted whole: the network reads all outputs of the weight.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r")
        refuse_below(0, self, "depth")
        if self.act_fn not in ACT2FN:
            hint = nearest(self.act_fn, ACT2FN) or "a name in transformers.activations.ACT2FN"
            raise PeftfxError(f"unknown activation {self.act_fn!r}", "act_fn", hint)

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def _layers(self, kind: str) -> list[str]:
        return [f"peanut_{kind}_{i}" for i in range(self.depth)]

    def keys(self, site: Site) -> dict[str, str]:
        inside = (name for kind in ("encoders", "decoders") for name in self._layers(kind))
        nested = {name: f"{name.rpartition('_')[0]}.{name.rpartition('_')[2]}.weight" for name in inside}
        return {A: f"{A}.weight", B: f"{B}.weight", **nested}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, r = len(base.weight), self.r
        shapes = {name: {A: (r, out), B: (out, r)}.get(name, (r, r)) for name in self.keys(site)}
        dtype, p = adapter_dtype(base.weight.dtype), {}
        for name, shape in shapes.items():
            p[name] = base.weight.new_zeros(shape, dtype=dtype)
            if name != B or not self.init_weights:
                p[name].uniform_(-1, 1, generator=rng).mul_(shape[1] ** -0.5)
        return p

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        delta = self._delta(base, p)
        return y + op(x.to(delta.dtype), delta).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return self.fold_over(site, base, base, p)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods. As in `forward`, the network reads the base's weight."""
        return Base(under.weight + self._delta(base, p), under.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        return Update(a=self._read(base.weight, p).T.float(), b=(p[B] * self.scaling).float())

    def _delta(self, base: Base, p: Params) -> Tensor:
        return (self._read(base.weight, p) @ p[B].T * self.scaling).T

    def _read(self, weight: Tensor, p: Params) -> Tensor:
        """Return the network's features of the weight before `B`, [in, r]."""
        act = ACT2FN[self.act_fn]
        hidden = act(weight.T.to(p[A].dtype) @ p[A].T)
        given = []
        for name in self._layers("encoders"):
            given.append(hidden)
            hidden = act(hidden @ p[name].T)
        for name in self._layers("decoders"):
            hidden = act(hidden @ p[name].T) + given.pop()
        return hidden
