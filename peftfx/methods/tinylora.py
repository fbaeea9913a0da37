"""TinyLoRA: a few trained numbers between frozen factors of the weight (arXiv:2602.04118).

`B` [out, r] and `A` [r, in] are the largest part of the weight's singular value decomposition. `R` [r, r] between them
is `sum v_i P_i`, with `P` [u, r, r] random, drawn from a seed for each place, and `v` [u] trained. A group of places
shares one `v`; groups are larger with more `weight_tying`. `forward` is `y + B R A dropout(x)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

V, SEED, A, B, P = (f"tinylora_{name}" for name in ("v", "seed", "A", "B", "P"))


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(WeightMethod):
    """Trained vectors of a few numbers, each shared by a group of linear layers and embeddings.

    Args:
        r: the rank of the frozen factors; at most the weight's rank.
        u: the length of a vector.
        weight_tying: the share of the places without a vector of their own.
        projection_seed: the seed of the random tensors. A place's seed is this number plus the place's number.
        save_projection: whether files have the random tensors; otherwise they are drawn again on loading.
        init_v_bound: the bound of the start values for `init_weights="uniform"`.
        tinylora_dropout: dropout on the adapter's input in training.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (tinylora_only).
        init_weights: True starts as the identity, "uniform" near the identity; False starts with numbers from 0 to 1.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.TinyLoRA(r=2, u=16))
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True

    peft_type: ClassVar[str] = "TINYLORA"
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    counted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "u")
        if not 0 <= self.weight_tying <= 1:
            what = f"weight_tying must be a share from 0 to 1, not {self.weight_tying}"
            raise PeftfxError(what, "weight_tying", "TinyLoRA(weight_tying=0.1)")

    @property
    def neutral(self) -> bool:
        return self.init_weights is True

    def frozen(self) -> frozenset[str]:
        return frozenset({A, B, P})

    def _group(self, sites: Sequence[Site], number: int) -> int:
        groups = max(1, round(len(sites) * (1.0 - self.weight_tying)))
        return min(number // max(1, len(sites) // groups), groups - 1)

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        made = {}
        for i in range(len(sites)):
            v = like.new_zeros(self.u, dtype=adapter_dtype(like.dtype))
            if self.init_weights is not True:
                low, high = (-self.init_v_bound, self.init_v_bound) if self.init_weights else (0, 1)
                v.uniform_(low, high, generator=rng)
            made[f"{V}_{self._group(sites, i)}"] = v
            made[f"{SEED}_{i}"] = torch.tensor(self.projection_seed + i)
        return made

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        number = sites.index(site)
        return {V: f"{V}_{self._group(sites, number)}", SEED: f"{SEED}_{number}"}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        groups = {self._group(sites, i) for i in range(len(sites))}
        return {f"{V}_{group}": f"base_model.{V}.{group}" for group in sorted(groups)}

    def keys(self, site: Site) -> dict[str, str]:
        return {name: name for name in ((A, B, P) if self.save_projection else (A, B))}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        u, s, vh = torch.linalg.svd(base.weight.float(), full_matrices=False)
        kind, rank, root = base.weight.dtype, min(self.r, len(s)), s[: self.r].to(base.weight.dtype).sqrt()
        a, b = root[:, None] * vh[:rank].to(kind), u[:, :rank].to(kind) * root  # HF PEFT rounds each part
        return {A: a.to(adapter_dtype(kind)).contiguous(), B: b.to(adapter_dtype(kind)).contiguous()}

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        rank, seed = min(self.r, *base.weight.shape), 0 if shared[SEED].is_meta else int(shared[SEED])
        own = torch.Generator().manual_seed(seed)
        return {P: torch.normal(0.0, rank**-0.5, (self.u, rank, rank), generator=own).to(shared[V].device)}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        r = self._between(p)
        if site.kind == "embedding":
            rows = dropped(op(x, p[B]), self.tinylora_dropout, training)
            return (y + rows @ r @ p[A]).to(y.dtype)
        read = dropped(x, self.tinylora_dropout, training).to(p[A].dtype)
        return (y + F.linear(F.linear(F.linear(read, p[A]), r), p[B])).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight + p[B] @ self._between(p) @ p[A], base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if site.kind == "embedding":
            return Update(a=(p[B] @ self._between(p)).T, b=p[A].T)
        return Update(a=self._between(p) @ p[A], b=p[B])

    def _between(self, p: Params) -> Tensor:
        return torch.einsum("i,ijk->jk", p[V], p[P])
