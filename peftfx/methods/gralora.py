"""GraLoRA: a separate low-rank update for each block of the weight (Jung et al. 2025, arXiv:2505.20355).

Inputs and outputs are cut into `k` parts. `A_n` maps the `n`-th input part to `r` features, `r / k` for each output
part. `B_j` maps the features for the `j`-th output part to it. So there are `k^2` blocks of rank `r / k`, with a total
rank of `k r`. `hybrid_r` is the rank of an additional LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.delta import dropped
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

A, B, GENERAL_A, GENERAL_B = "gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"


@dataclass(frozen=True, kw_only=True)
class GraLoRA(WeightMethod):
    """Low-rank updates of the blocks of linear weights.

    Args:
        r: the rank of all blocks of one input part, a multiple of `gralora_k`.
        hybrid_r: the rank of the additional LoRA; 0 means none.
        alpha: the numerator of the scale, `alpha / (r + hybrid_r)`.
        gralora_dropout: dropout on the adapter's input in training.
        gralora_k: the number of parts of inputs and of outputs; a divisor of both.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (gralora_only).
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.GraLoRA(r=32, gralora_k=2))
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "GRALORA"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gralora_k < 1 or self.r < 1 or self.r % self.gralora_k:
            what = f"r must be a multiple of gralora_k, both 1 or more, not {self.r} of {self.gralora_k}"
            raise PeftfxError(what, "r, gralora_k", "GraLoRA(r=32, gralora_k=2)")
        refuse_below(0, self, "hybrid_r")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def keys(self, site: Site) -> dict[str, str]:
        general = {name: f"{name}.weight" for name in (GENERAL_A, GENERAL_B)}
        return {A: A, B: B, **(general if self.hybrid_r else {})}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        (out, inner), k, r = base.weight.shape, self.gralora_k, self.r
        if out % k or inner % k:
            what = f"{k} parts do not divide a weight of {out} x {inner}"
            raise PeftfxError(what, site.path, "gralora_k=, a divisor of both")
        sizes: dict[str, tuple[int, ...]] = {A: (k, r, inner // k), B: (k, out // k, r)}
        if self.hybrid_r:
            sizes |= {GENERAL_A: (self.hybrid_r, inner), GENERAL_B: (out, self.hybrid_r)}
        like = torch.zeros((), dtype=adapter_dtype(base.weight.dtype), device=base.weight.device)
        p = {}
        for name, size in sizes.items():
            p[name] = like.new_zeros(size)
            if name in (A, GENERAL_A) or not self.init_weights:
                p[name].uniform_(-1, 1, generator=rng).mul_(size[-1] ** -0.5)
        return {**p, A: p[A].transpose(1, 2).contiguous(), B: p[B].transpose(1, 2).contiguous()}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        k, scale = self.gralora_k, self.alpha / (self.r + self.hybrid_r)
        given = dropped(x, self.gralora_dropout, training).to(p[A].dtype)
        inner = torch.einsum("...ni,nir->...nr", given.unflatten(-1, (k, -1)), p[A])
        gathered = inner.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)
        y = y + (scale * torch.einsum("...jr,jro->...jo", gathered, p[B]).flatten(-2)).to(y.dtype)
        if not self.hybrid_r:
            return y
        again = dropped(x, self.gralora_dropout, training).to(p[A].dtype)
        return y + (scale * F.linear(F.linear(again, p[GENERAL_A]), p[GENERAL_B])).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        """Return the update: A has a row for each input part and rank, B zeros for other output parts' ranks."""
        k, each = self.gralora_k, self.r // self.gralora_k
        a = torch.block_diag(*p[A].transpose(1, 2))
        eye = torch.eye(k, dtype=p[B].dtype, device=p[B].device)
        # B_j [(n s), o] goes to [(j o), (n j s)]
        b = torch.einsum("jm,jnso->jonms", eye, p[B].view(k, k, each, -1)).reshape(base.weight.shape[0], -1)
        if self.hybrid_r:
            a, b = torch.cat([a, p[GENERAL_A]]), torch.cat([b, p[GENERAL_B]], 1)
        return Update(a=a, b=b * (self.alpha / (self.r + self.hybrid_r)))
