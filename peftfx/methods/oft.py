"""OFT: rotates the input of a linear layer, block by block (Qiu et al. 2023, arXiv:2306.07280).

The weight is `W R^T`, with `R` block-diagonal. Each block is the Cayley transform `(I - Q)(I + Q)^-1` of a trained
skew-symmetric `Q`, or the transform's Neumann series. At an embedding the output is rotated. Rotations have full rank:
there is no low-rank update. Convs are not adapted: there HF PEFT's forward adds up overlapping patches, and differs
from its merged weight.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.skew import cayley, skew_matrix
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

R = "oft_R"


@dataclass(frozen=True, kw_only=True)
class OFT(WeightMethod):
    """Rotations of blocks of the input of linear layers, and of the output of embeddings.

    Args:
        r: the number of blocks; 0 if `oft_block_size` is given.
        oft_block_size: the features of a block, rounded to the nearest divisor; 0 if `r` is given.
        coft: keep each `Q` near 0. HF PEFT changes the trained tensors in each call, so peftfx only reads such files,
            and does not train them.
        eps: the bound of `Q` for `coft`.
        block_share: whether all blocks share one rotation.
        use_cayley_neumann: whether the first terms of a series replace the inverse.
        num_cayley_neumann_terms: the number of terms, including `I`; the last term counts once, others twice.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (oft_only).
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.OFT(oft_block_size=32, target="mlp"))
    """

    r: int = 0
    oft_block_size: int = 32
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = "OFT"
    # A rotation of the input acts on all rows: fused projections are adapted whole.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"module_dropout"}
    )  # HF PEFT makes a dropout layer of it, and never runs it

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r > 0) == (self.oft_block_size > 0) or min(self.r, self.oft_block_size) < 0:
            what = f"set one of the two above 0 and the other to 0, not {self.r} and {self.oft_block_size}"
            raise PeftfxError(what, "r, oft_block_size", "OFT(oft_block_size=32), or OFT(r=4, oft_block_size=0)")
        refuse_below(1, self, "num_cayley_neumann_terms")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def obstacle(self) -> PeftfxError | None:
        if not self.coft:
            return None
        what = "with coft=True, HF PEFT overwrites the trained tensors in each call, unknown to the optimiser"
        return PeftfxError(what, "coft", "train without it; adapters that have it are loaded, merged and exported")

    @property
    def reruns(self) -> bool:
        return True

    def keys(self, site: Site) -> dict[str, str]:
        return {R: "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"}

    def _block(self, features: int) -> int:
        """Return the size of a block: the requested size made a divisor, as in HF PEFT."""
        if self.r:
            return features // _divisor(features, self.r)
        return _divisor(features, self.oft_block_size)

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        features = base.weight.shape[1]
        size = self._block(features)
        count = 1 if self.block_share else features // size
        skew = base.weight.new_zeros(count, size * (size - 1) // 2, dtype=adapter_dtype(base.weight.dtype))
        return {R: skew if self.init_weights else skew.normal_(std=0.1, generator=rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        rotation = self._rotation(base, p)
        if site.kind == "embedding":
            rows = op(x, base.weight)
            return self._turned(rows, rotation).to(rows.dtype)
        return op(self._turned(x, rotation).to(x.dtype), base.weight, base.bias)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        rotation = self._rotation(base, p)
        if site.kind != "embedding":
            rotation = rotation.transpose(1, 2)
        return Base(self._turned(base.weight, rotation), base.bias)

    def _turned(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Multiply the last dimension by the blocks."""
        blocks = x.to(rotation.dtype).unflatten(-1, (-1, rotation.shape[1]))
        if self.block_share:  # a product with one matrix would branch on the sizes
            rotation = rotation.expand(blocks.shape[-2], -1, -1)
        return torch.einsum("...rk,rkc->...rc", blocks, rotation).flatten(-2)

    def _rotation(self, base: Base, p: Params) -> Tensor:
        """Return the blocks of `R`, [blocks, size, size]."""
        size = self._block(base.weight.shape[1])
        skew = skew_matrix(p[R], size)
        if self.coft:
            most = self.eps * len(skew) ** -0.5
            length = skew.norm(dim=(1, 2), keepdim=True)
            near = torch.where(length <= most, skew, skew * (most / length))
            skew = near.detach() + (skew - skew.detach())  # projected as in HF PEFT, with `skew`'s gradient
        if not self.use_cayley_neumann:
            return cayley(skew).to(skew.dtype)
        eye = torch.eye(size, dtype=skew.dtype, device=skew.device).expand_as(skew)
        rotation, power, terms = eye, eye, self.num_cayley_neumann_terms
        for term in range(1, terms):
            power = power @ skew
            rotation = rotation + (1 if term == max(terms - 1, 2) else 2) * power
        return rotation


def _divisor(size: int, near: int) -> int:
    """Return the divisor of a size that is nearest to a number; of two equally near, the smaller."""
    steps = itertools.count()  # `min` with a key would end a graph of torch.compile
    return next(n for far in steps for n in (near - far, near + far) if n > 0 and size % n == 0)
