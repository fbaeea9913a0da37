"""AdaMSS: low-rank updates within clusters of the weight's rows (Zheng et al. 2025, NeurIPS).

The weight, with its bias as one more column, is approximated by its `r` largest singular values, `U S V`. Its rows are
grouped into clusters by the rows of `U`. Each cluster has its own update `B_i A_i V`, with `A_i` and `B_i` trained.
Files have no clusters: scikit-learn finds them again in the base's weight, from a fixed seed, as in HF PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.subspaces import clusters, freeze_clusters, remembered
from peftfx.contract.kept import Kept
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

A, B, V, ORDER = "adamss_A", "adamss_B", "adamss_newB", "order"


@dataclass(frozen=True, kw_only=True)
class AdaMSS(WeightMethod):
    """Low-rank updates within clusters of rows of linear weights, and of their biases.

    Args:
        r: the number of singular values; at most the weight's.
        num_subspaces: how many clusters of rows.
        subspace_rank: the rank of each cluster's update; at most the cluster's rows.
        use_dynamic_rank, svd_threshold: limit a cluster's rank to the number of its singular values above this share of
            the largest.
        random_seed: the seed of the decomposition.
        use_asa: whether `update_and_allocate` freezes the clusters that matter least.
        asa_target_subspaces: how many clusters of all places are trained in the end.
        init_warmup, final_warmup: the first and the last step in which clusters are frozen.
        mask_interval: how many steps lie between two freezes.
        asa_importance_beta, asa_uncertainty_beta: the decay of the averages of a cluster's importance, and of its
            uncertainty.
        asa_schedule_exponent: with a larger exponent, clusters are frozen sooner.
        init_weights: "orthogonal" starts as the identity; None starts near the identity.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.AdaMSS(r=16, num_subspaces=2, subspace_rank=1))
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    init_weights: str | bool | None = "orthogonal"

    peft_type: ClassVar[str] = "ADAMSS"
    # Fused projections are adapted whole: clusters are of the whole weight's rows.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    schedule: ClassVar[frozenset[str]] = frozenset(
        {
            *("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
            *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "num_subspaces", "subspace_rank", "mask_interval", "asa_target_subspaces")
        if self.init_weights not in ("orthogonal", None, False):
            what = f"unknown start {self.init_weights!r}"
            raise PeftfxError(what, "init_weights", "one of 'orthogonal', None")
        if self.use_asa and (self.init_warmup >= self.final_warmup or self.asa_schedule_exponent <= 0):
            what = "clusters are frozen from init_warmup to final_warmup, by an exponent above 0"
            raise PeftfxError(what, "init_warmup", "AdaMSS(use_asa=True, init_warmup=50, final_warmup=1000)")

    @property
    def neutral(self) -> bool:
        return self.init_weights == "orthogonal"

    def frozen(self) -> frozenset[str]:
        return frozenset({V})

    def remembered(self) -> frozenset[str]:
        return remembered(A, B, count=self.num_subspaces) if self.use_asa else frozenset()

    def adjust(self, places: Sequence[Kept], step: int) -> None:
        if self.use_asa:
            freeze_clusters(self, places, step, A, B)

    def keys(self, site: Site) -> dict[str, str]:
        count = min(self.num_subspaces, site.rows)
        return {f"{name}_{i}": f"{name}.{i}" for name in (A, B) for i in range(count)} | {V: V}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        with unset_fake_temporarily():  # the sizes of clusters depend on the values of the base
            return self._started(base, site.path, rng)

    def _started(self, base: Base, where: str, rng: torch.Generator | None) -> dict[str, Tensor]:
        bias = [] if base.bias is None else [base.bias[:, None]]
        weight = torch.cat([base.weight, *bias], 1).detach().float()
        kind, count = base.weight.dtype, min(self.num_subspaces, len(weight))
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(self.random_seed)
            u, _, v = torch.svd_lowrank(weight, q=min(self.r, *weight.shape), niter=2)
        known = not (weight.is_meta or isinstance(weight, FakeTensor))  # without values the sizes are only a guess
        rows = clusters(u, count, where) if known else torch.arange(len(u), device=u.device).tensor_split(count)
        p = {V: v.T.to(kind).to(adapter_dtype(kind)).contiguous(), ORDER: torch.cat(list(rows)).argsort()}
        for i, own in enumerate(rows):
            left, s, right = torch.linalg.svd(u[own], full_matrices=False)
            most = int((s**2 > self.svd_threshold * s[0] ** 2).sum()) if self.use_dynamic_rank and known else len(own)
            few = max(1, min(self.subspace_rank, len(own), most))
            p[f"{A}_{i}"] = right[:few].to(p[V].dtype).contiguous()
            p[f"{B}_{i}"] = left.new_zeros(len(own), few, dtype=p[V].dtype)
            if not self.neutral:
                p[f"{B}_{i}"].normal_(std=0.01, generator=rng)
        return p

    def apart_from_base(self, made: Params, read: Params) -> str:
        apart = float((made[V] - read[V]).abs().max()) > 0.02 * float(made[V].abs().max())
        return "the file is of another base: its clusters of rows are not this one's" if apart else ""

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        a, b = self._factors(p)
        inner, v = base.weight.shape[1], p[V]
        column = v[:, inner] if v.shape[1] > inner else None
        return (y + F.linear(F.linear(F.linear(x.to(v.dtype), v[:, :inner], column), a), b)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        told = self.update(site, base, p)
        return Base(told.apply(base.weight), told.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        a, b = self._factors(p)
        inner, down = base.weight.shape[1], a @ p[V]
        return Update(a=down[:, :inner], b=b, bias=None if base.bias is None else base.bias + b @ down[:, inner])

    def _factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """Return the `A` of all clusters, stacked, and their `B`, each in its columns and its cluster's rows."""
        count = sum(name.startswith(f"{B}_") and name[-1].isdigit() for name in p)
        blocks = torch.block_diag(*(p[f"{B}_{i}"] for i in range(count)))
        return torch.cat([p[f"{A}_{i}"] for i in range(count)]), blocks.index_select(0, p[ORDER])
