"""Combination: how several adapters become one adapter, by HF PEFT's combination types.

Each type merges tensors of one shape, each with its weight. `linear`, `cat` and `svd` sum them. `magnitude_prune` first
keeps the largest entries of each tensor; `dare_linear` first keeps random entries, rescaled. `ties` and `dare_ties`
take, entry by entry, the mean of the values that have the majority's sign (Yadav et al. 2023, arXiv:2306.01708; Yu et
al. 2023, arXiv:2311.03099). The tensors are the factors. In `svd` and in types that end in `_svd` they are the updates,
and the merged update is cut to a rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.field_types import refuse_misfit_fields
from peftfx.options import CAT, LINEAR, check_choice

_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = (LINEAR, CAT, "svd", *_PRUNED, *(f"{kind}_svd" for kind in _PRUNED))


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The options for combining several adapters into one, by HF PEFT's names.

    Args:
        combination_type: one of `KINDS`.
        svd_rank: the rank of the factors that an SVD gives; by default the largest rank of the adapters.
        svd_clamp: the quantile to which the SVD's factors are clamped.
        density: the share of entries that pruning keeps.
        majority_sign_method: `total` weighs signs by magnitude, `frequency` counts them.
    """

    combination_type: str = LINEAR
    svd_rank: int | None = None
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        check_choice(self.combination_type, KINDS, "combination_type", "unknown way to combine:")
        check_choice(self.majority_sign_method, ("total", "frequency"), "majority_sign_method", "unknown way to count:")
        if self.prunes and self.density is None:
            what = (
                f"{self.combination_type} keeps a share of the entries, and density, which sets the share, is missing"
            )
            raise PeftfxError(what, "density", "density=0.5")
        for name, value in (("density", self.density), ("svd_clamp", self.svd_clamp)):
            if value is not None and not 0 < value <= 1:
                raise PeftfxError(f"{name} must be a share above 0 and at most 1, not {value}", name, f"{name}=0.5")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise PeftfxError(f"the rank must be 1 or more, not {self.svd_rank}", "svd_rank", "svd_rank=8")

    @property
    def prunes(self) -> bool:
        """Whether this type keeps only a share of the entries."""
        return self.combination_type.removesuffix("_svd") in _PRUNED

    @property
    def cuts(self) -> bool:
        """Whether updates are merged and then cut to a rank. Otherwise the factors are merged."""
        return self.combination_type.endswith("svd")

    def of(self, count: int, rank: int) -> Combination:
        """Return this combination for `count` adapters of at most `rank`. As in HF PEFT, one adapter is only scaled."""
        if count == 1 and self.combination_type != CAT:
            return Combination()
        return dataclasses.replace(self, svd_rank=self.svd_rank or rank or None)

    def merge(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """Merge tensors of one shape, each with its weight. Random types draw from torch's own generator."""
        kind = self.combination_type.removesuffix("_svd")
        kept = torch.stack([self._pruned(t, random=kind.startswith("dare")) if self.prunes else t for t in tensors])
        weighted = kept * torch.tensor(weights, dtype=kept.dtype).view(-1, *(1,) * (kept.ndim - 1)).to(kept.device)
        if not kind.endswith("ties"):
            return weighted.sum(0)
        signs = kept.sign()
        votes = (kept if self.majority_sign_method == "total" else signs).sum(0)
        agree = signs == torch.where(votes >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor, *, random: bool) -> Tensor:
        assert self.density is not None
        if self.density >= 1:
            return tensor
        if random:
            return tensor * torch.bernoulli(torch.full_like(tensor, self.density)) / self.density
        best = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        return tensor * torch.zeros_like(tensor).flatten().index_fill(0, best, 1).view(tensor.shape)

    def cut(self, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best factors A [rank, in] and B [out, rank] of `update` [out, in], singular values in B."""
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        b, a = u[:, : self.svd_rank] * s[: self.svd_rank], vh[: self.svd_rank]
        if self.svd_clamp is None:
            return a, b
        most = torch.quantile(torch.cat([b.flatten(), a.flatten()]), self.svd_clamp)
        return a.clamp(-most, most), b.clamp(-most, most)
