"""Lily: low-rank updates whose factors are shared across layers, and mixed by a router (arXiv:2407.09946).

`forward` is `y + s h sum_e p_e B_e`, with `h = A x` and `p` the mean of `softmax(R h)` over all tokens of the batch.
Places whose names end alike and whose weights have one shape form a group. All places of a group share all `B_e`;
`stride_A` successive layers share one `A`. Each place has its own router `R`. A row's output depends on the other rows
of the batch, which no weight can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

A, B, ROUTER = "lily_A", "lily_B", "lily_router"


@dataclass(frozen=True, kw_only=True)
class Lily(WeightMethod):
    """Low-rank updates of linear layers, with factors that layers share.

    Args:
        r: the rank of the update.
        stride_A: how many successive layers share one `A`.
        num_B: the number of `B` that all layers share; 2 or more.
        scaling: the factor of the update.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.Lily(r=8, target="mlp"))
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "LILY"
    # Fused projections are adapted whole: HF PEFT's files have no parts, and so no factors for the rows of one part.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "stride_A")
        refuse_below(2, self, "num_B")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def unfoldable(self) -> str:
        return "Lily mixes its factors by a mean over all tokens of a batch: no weight does what it does"

    def naming(self, paths: Sequence[str], modules: Sequence[str]) -> Self:
        named = super().naming(paths, modules)
        ends = [path.rpartition(".")[2] for path in paths]
        if named is not self and set(named.target_modules or ()) != set(ends) and len(set(ends)) < len(ends):
            what = (
                "HF PEFT shares factors by the ends of module names, and modules that are not adapted "
                "have these ends too"
            )
            raise PeftfxError(what, min(paths), "give target_modules that only these modules' names end in")
        return named

    def _groups(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        """Return the groups of places that share all `B`, by the name of the shared tensor."""
        found: dict[object, list[Site]] = {}
        for site in sites:
            found.setdefault((self._end(site.path), site.shape), []).append(site)
        return {f"{B}_{i}": group for i, group in enumerate(found.values())}

    def _end(self, path: str) -> str:
        """Return the target of a place in HF PEFT's config."""
        if self.target is not None or not self.target_modules:
            return path.rpartition(".")[2]
        if isinstance(self.target_modules, str):
            return path.rpartition(".")[2] if self.target_modules == "all-linear" else ""
        return max((name for name in self.target_modules if path.endswith(name)), key=len, default="")

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        made = {}
        new = like.new_empty(0, dtype=adapter_dtype(like.dtype))
        for name, group in self._groups(sites).items():
            out, inner = group[0].shape[::-1] if group[0].transposed else group[0].shape
            made[name] = new.new_zeros(self.num_B * self.r, out)
            if not self.init_weights:
                _spread(made[name], rng)
            for i in range(0, len(group), self.stride_A):
                made[f"{name}_{A}_{i}"] = _spread(new.new_empty(self.r, inner), rng)
        return made

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        name, group = next((name, group) for name, group in self._groups(sites).items() if site in group)
        return {A: f"{name}_{A}_{group.index(site) // self.stride_A * self.stride_A}", B: name}

    def keys(self, site: Site) -> dict[str, str]:
        return {name: f"{name}.weight" for name in (A, B, ROUTER)}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        new = base.weight.new_empty(self.num_B, self.r, dtype=adapter_dtype(base.weight.dtype))
        return {ROUTER: _spread(new, rng)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        hidden = F.linear(x.to(p[A].dtype), p[A])
        chosen = F.linear(hidden, p[ROUTER]).softmax(-1).reshape(-1, self.num_B).mean(0)
        up = (chosen @ p[B].reshape(self.num_B, -1)).view(self.r, -1)
        return y + (hidden @ up * self.scaling).to(y.dtype)


def _spread(t: Tensor, rng: torch.Generator | None) -> Tensor:
    """Fill a tensor with Kaiming's uniform numbers, as HF PEFT draws them for a linear layer."""
    bound = 1 / math.sqrt(t.shape[1])
    return t.uniform_(-bound, bound, generator=rng)
