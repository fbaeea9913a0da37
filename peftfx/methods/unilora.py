"""Uni-LoRA: low-rank factors whose entries are taken from one trained vector (Li et al. 2025, arXiv:2506.00799).

All places of a rule share `theta` [theta_d_length]. Each entry of each `A` [r, in] and `B` [out, r] is an entry of
`theta`, divided by the square root of how often that entry is used. The indices are drawn from a seed for all places
together. So the map from `theta` to all factors is an isometry. `forward` is `y + B A dropout(x)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.factored import FactoredMethod
from peftfx.contract.method import Base, Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

THETA, NUMBERS, ROOTS = "unilora_theta_d", "unilora_numbers", "unilora_roots"
INDICES_A, INDICES_B, SCALES_A, SCALES_B = (f"unilora_{n}" for n in ("indices_A", "indices_B", "scales_A", "scales_B"))


@dataclass(frozen=True, kw_only=True)
class UniLoRA(FactoredMethod):
    """Factors of linear layers whose entries all come from one trained vector.

    Args:
        r: the rank of the update.
        proj_seed: the seed of the entries' indices.
        theta_d_length: the length of the vector.
        unilora_dropout: dropout on the adapter's input in training.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (unilora_only).
        init_theta_d_bound: the bound of the vector's uniform start values. As in HF PEFT, a new adapter is not the
            identity.
        init_weights: whether the vector starts uniform; otherwise it starts normal.
        save_indices: whether files have the indices; otherwise they are drawn again, which needs the same modules.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.UniLoRA(r=4))
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    peft_type: ClassVar[str] = "UNILORA"
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "theta_d_length")
        if self.init_theta_d_bound <= 0:
            raise PeftfxError("the bound must be more than 0", "init_theta_d_bound", "UniLoRA(init_theta_d_bound=0.02)")

    @property
    def neutral(self) -> bool:
        return False

    @property
    def input_dropout(self) -> float:
        return self.unilora_dropout

    def frozen(self) -> frozenset[str]:
        return frozenset({SCALES_A, SCALES_B, ROOTS})

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        counts = [self.r * sum(_sizes(site)) for site in sites]
        numbers = _drawn(sum(counts), self.theta_d_length, self.proj_seed)
        taken = torch.zeros(self.theta_d_length).index_add(0, numbers, torch.ones(len(numbers)))
        roots = torch.where(taken > 0, taken.clamp_min(1).rsqrt(), 0)
        theta = like.new_empty(self.theta_d_length, dtype=adapter_dtype(like.dtype))
        bound = self.init_theta_d_bound
        made = {
            THETA: theta.uniform_(-bound, bound, generator=rng) if self.init_weights else theta.normal_(generator=rng),
            ROOTS: roots.to(like).to(theta.dtype),
        }
        return made | {_numbers(i): n.to(like.device) for i, n in enumerate(numbers.split(counts))}

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        return {THETA: THETA, ROOTS: ROOTS, NUMBERS: _numbers(sites.index(site))}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {THETA: f"base_model.{THETA}"}

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in (INDICES_A, INDICES_B, SCALES_A, SCALES_B)} if self.save_indices else {}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {}

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, inner = base.weight.shape
        a, b = shared[NUMBERS].split([self.r * inner, self.r * out])
        a, b = a.view(self.r, inner).clone(), b.view(out, self.r).clone()
        return {INDICES_A: a, INDICES_B: b, SCALES_A: shared[ROOTS][a], SCALES_B: shared[ROOTS][b]}

    def factors(self, base: Base, p: Params) -> tuple[Tensor, Tensor]:
        return p[THETA][p[INDICES_A]] * p[SCALES_A], p[THETA][p[INDICES_B]] * p[SCALES_B]


def _numbers(place: int) -> str:
    return f"{NUMBERS}_{place}"


def _sizes(site: Site) -> tuple[int, int]:
    return site.shape[0], site.shape[1]


def _drawn(count: int, length: int, seed: int) -> Tensor:
    """Draw an index of the vector for each entry of all factors: shuffled, and each index equally often, up to 1."""
    rng, (often, left) = np.random.default_rng(seed), divmod(count, length)
    drawn = np.repeat(np.arange(length), often)
    if left:
        drawn = np.concatenate([drawn, rng.choice(length, size=left, replace=False)])
    rng.shuffle(drawn)
    return torch.as_tensor(drawn, dtype=torch.long)
