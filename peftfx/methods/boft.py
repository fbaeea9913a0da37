"""BOFT: rotates the input by a product of sparse rotations, as in a butterfly (Liu et al. 2023, arXiv:2311.06243).

The weight is `s W R^T`, with `s` a trained scale of each output, and `R` the product of `boft_n_butterfly_factor`
factors. Each factor is block-diagonal after a permutation of half blocks. A block is the Cayley transform
`(I - Q)(I + Q)^-1` of the skew part `Q` of a trained matrix. The bias is not changed. Rotations have full rank: there
is no low-rank update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, along_rows
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.skew import cayley
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

R, S = "boft_R", "boft_s"


@dataclass(frozen=True, kw_only=True)
class BOFT(WeightMethod):
    """Butterfly rotations of the input of linear layers, and of the patches that a conv reads.

    Args:
        boft_block_size: the features of a block, a divisor of the inputs; 0 if `boft_block_num` is given.
        boft_block_num: the number of blocks; 0 if `boft_block_size` is given.
        boft_n_butterfly_factor: the number of factors; one factor is the same as OFT. HF PEFT needs CUDA for more.
        boft_dropout: the share of the blocks of one random factor that each call in training leaves out.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (boft_only).
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.BOFT(boft_block_size=4, target="mlp"))
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "BOFT"
    # A rotation of the input acts on all rows: fused projections are adapted whole.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def __post_init__(self) -> None:
        super().__post_init__()
        size, count = self.boft_block_size, self.boft_block_num
        if (size > 0) == (count > 0) or min(size, count) < 0:
            what = f"set one of the two above 0 and the other to 0, not {size} and {count}"
            hint = "BOFT(boft_block_size=4), or BOFT(boft_block_num=8, boft_block_size=0)"
            raise PeftfxError(what, "boft_block_size, boft_block_num", hint)
        refuse_below(1, self, "boft_n_butterfly_factor")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def reruns(self) -> bool:
        return True

    def keys(self, site: Site) -> dict[str, str]:
        return {R: R, S: S}

    def as_saved(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[BOFT, str]:
        found = {shape[0] for name, shape in shapes.items() if name.rpartition(".")[2] == R and len(shape) == 4}
        if len(found) != 1 or (count := found.pop()) >= self.boft_n_butterfly_factor or not count:
            return self, ""
        why = (
            f"the config says boft_n_butterfly_factor={self.boft_n_butterfly_factor}, and the tensors have {count}, as "
            f"peft trains without its CUDA extension: {count} is what it was trained with, and what is used"
        )
        return dataclasses.replace(self, boft_n_butterfly_factor=count), why

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        if site.groups > 1:
            raise PeftfxError("BOFT does not act on convs of several groups", site.path, "exclude this module")
        features, factors = base.weight[0].numel(), self.boft_n_butterfly_factor
        asked = self.boft_block_size or self.boft_block_num
        if features % asked:
            option = "boft_block_size" if self.boft_block_size else "boft_block_num"
            what = f"{option}={asked} does not divide the {features} inputs of this layer"
            raise PeftfxError(what, site.path, "give a common divisor of the inputs of all targeted layers")
        count = self.boft_block_num or features // asked
        size = features // count
        if factors > 1 and (count % 2 ** (factors - 1) or size % 2):
            what = f"{factors} butterfly factors cannot be made of {count} blocks of size {size}"
            raise PeftfxError(what, site.path, f"blocks of an even size, {2 ** (factors - 1)} of them or a multiple")
        like = torch.zeros((), dtype=adapter_dtype(base.weight.dtype), device=base.weight.device)
        out = len(base.weight)
        scale = like.new_ones((1, out) if site.kind == "conv" else (out, 1))
        skew = like.new_zeros(factors, count, size, size)
        if not self.init_weights:
            skew.normal_(std=0.1, generator=rng)
            scale.normal_(1, 0.1, generator=rng)
        return {R: skew, S: scale}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        blocks = self._blocks(p, training)
        if site.kind == "conv":
            return op(x.to(blocks.dtype), *_folded(base, blocks, p)).to(x.dtype)
        turned = op(_turned(x.to(blocks.dtype), blocks.flip(0)).to(x.dtype), base.weight, base.bias)
        bias = 0 if base.bias is None else base.bias
        return ((turned - bias) * p[S].flatten() + bias).to(x.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return _folded(base, self._blocks(p, training=False), p)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods. As in `forward`, what they have added to the bias is scaled too."""
        made = self.fold(site, under, p)
        if made.bias is None:
            return made
        own = 0 if base.bias is None else base.bias
        return Base(made.weight, (made.bias - own) * p[S].flatten() + own)

    def _blocks(self, p: Params, training: bool) -> Tensor:
        """Return the rotations, [factors, blocks, size, size]. In training, some of one factor are the identity."""
        skew = 0.5 * (p[R] - p[R].transpose(-1, -2))
        blocks = cayley(skew).to(skew.dtype)
        factors, count = blocks.shape[:2]
        if not training or not self.boft_dropout:
            return blocks
        number = torch.randint(0, factors, (1,), device=skew.device)
        left_out = torch.randperm(count, device=skew.device) < int(self.boft_dropout * count)
        factor = torch.arange(factors, device=skew.device) == number
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.where((factor[:, None] & left_out)[..., None, None], eye, blocks)


def _folded(base: Base, blocks: Tensor, p: Params) -> Base:
    rows = base.weight.flatten(1).to(blocks.dtype)
    weight = _turned(rows, blocks.transpose(-1, -2), transposed=True).view(base.weight.shape)
    bias = None if base.bias is None else base.bias.to(blocks.dtype)
    return Base(weight * along_rows(p[S].flatten(), weight), bias)


def _turned(x: Tensor, blocks: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply the last dimension by each factor in turn: of `R`, or of its transpose, from first to last.

    Factor `i` reorders each `2^(i+1)` half blocks: first the even, then the odd. That is a transposition of two
    dimensions.
    """
    factors, _, size, _ = blocks.shape
    for k, block in enumerate(blocks):
        i = k if transposed else factors - 1 - k
        units = (2, 2**i, size // 2)
        if i:
            x = x.unflatten(-1, (-1, *units)).transpose(-3, -2).flatten(-4)
        x = torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (-1, size)), block).flatten(-2)
        if i:
            x = x.unflatten(-1, (-1, units[1], 2, units[2])).transpose(-3, -2).flatten(-4)
    return x
