"""MiSS: one matrix for all shards of a layer's input (Kang and Yin 2024, arXiv:2409.15371).

The input is cut into shards of `r` features, which are summed: `forward` is `y + sum(shards of dropout(x)) B`, with `B`
[r, out]. So `B` is added to each `r` columns of the weight. In graphs with slots the update has rank `r`.

"bat" cuts the weight into blocks `W_ij` of `r` x `r`. Each row of blocks has its own matrix `B_i` [r, r], and a block
becomes `W_ij + W_ij B_i + B_i`. This update has full rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, row_index
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.delta import DeltaMethod, dropped
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site

_BLOCK = "miss_block"


@dataclass(frozen=True, kw_only=True)
class MiSS(DeltaMethod):
    """One trained matrix that multiplies all shards of the input of a linear layer.

    Args:
        r: the features of a shard.
        miss_dropout: dropout on the adapter's input in training; "bat" has none, as in HF PEFT.
        mini_r: with `init_weights="mini"`, the number of outputs of the matrix, which are repeated.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (MiSS_only).
        init_weights: True starts as the identity, False at random. "mini" has a smaller matrix, "bat" a matrix for each
            row of blocks; both start as the identity.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.MiSS(r=16))
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    bias: Literal["none", "all", "MiSS_only"] = "none"
    init_weights: bool | Literal["mini", "bat"] = True

    peft_type: ClassVar[str] = "MISS"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "mini_r")

    @property
    def neutral(self) -> bool:
        return bool(self.init_weights)

    @property
    def _bat(self) -> bool:
        return self.init_weights == "bat"

    def keys(self, site: Site) -> dict[str, str]:
        return {_BLOCK: _BLOCK}

    @property
    def replaces(self) -> bool:
        return self._bat

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, inner = base.weight.shape
        if self.r > inner:
            raise PeftfxError(
                f"r={self.r} is more than the {inner} inputs of this layer", site.path, f"r={inner} or less"
            )
        if self.init_weights == "mini" and out % self.mini_r:
            raise PeftfxError(f"mini_r={self.mini_r} does not divide {out} outputs", site.path, "mini_r=1")
        if self._bat and (out % self.r or inner % self.r):
            what = f"a weight of {out} x {inner} is not cut into blocks of {self.r} x {self.r}"
            raise PeftfxError(what, site.path, "a common divisor of both sizes as r")
        new = functools.partial(base.weight.new_zeros, dtype=adapter_dtype(base.weight.dtype))
        if self._bat:
            return {_BLOCK: new(out // self.r, self.r, self.r)}
        block = new(self.r, self.mini_r if self.init_weights == "mini" else out)
        if not self.init_weights:
            block.uniform_(-1, 1, generator=rng).mul_(out**-0.5)
        return {_BLOCK: block}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        if self._bat:
            return super().forward(site, op, x, y, base, p, training)
        block = self._block(base.weight, p)
        given = dropped(x, self.miss_dropout, training).to(block.dtype)
        short = -base.weight.shape[1] % self.r
        shards = (F.pad(given, (0, short)) if short else given).unflatten(-1, (-1, self.r))
        return (y + shards.sum(-2) @ block).to(y.dtype)

    def delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        inner = weight.shape[1]
        if not self._bat:
            return self._block(weight, p).T.repeat(1, -(-inner // self.r))[:, :inner]
        each = p[_BLOCK]  # [rows of blocks, r, r]
        blocks = weight.to(each.dtype).unflatten(0, (-1, self.r)).unflatten(2, (-1, self.r))
        return (torch.einsum("iajk,ikb->iajb", blocks, each) + each[:, :, None]).reshape(weight.shape)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods. As in `forward`, the blocks are those of the base's weight."""
        return Base(under.weight + self.delta(site, base.weight, p), under.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if self._bat:
            return super().update(site, base, p)
        block, inner = self._block(base.weight, p), base.weight.shape[1]
        shards = torch.eye(self.r, dtype=block.dtype, device=block.device).repeat(1, -(-inner // self.r))
        return Update(a=shards[:, :inner], b=block.T)

    def _block(self, weight: Tensor, p: Params) -> Tensor:
        out, columns = weight.shape[0], p[_BLOCK].shape[1]
        return p[_BLOCK] if columns == out else p[_BLOCK].repeat(1, out // columns)

    @torch.no_grad()
    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[MiSS, dict[str, Tensor]]:
        """Return one matrix, with 0 at the rows of no part."""
        if self.init_weights in ("mini", "bat"):
            return super().whole(site, base, parts)
        block = next(iter(parts.values()))[_BLOCK].new_zeros(self.r, base.weight.shape[0])
        for rows, p in parts.items():
            block[:, row_index(rows)] = p[_BLOCK]
        return self, {_BLOCK: block}
