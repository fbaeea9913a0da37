"""HiRA: adds the elementwise product of a low-rank matrix and the weight (Huang et al. 2025).

The weight is `W + W * (B A)`, with `A` [r, in] and `B` [out, r]. The product can have the weight's full rank: there is
no low-rank update. At an embedding the table is [num, dim], and `A` belongs to its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype, row_index
from peftfx.contract.common.delta import dropped
from peftfx.contract.common.low_rank import product
from peftfx.contract.common.patterns import by_path, path_pattern, pattern_of, refuse_ranks
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site

A, B = "hira_A", "hira_B"
A_EMBEDDING = "hira_embedding_A"  #: the name of A in files, at an embedding


@dataclass(frozen=True, kw_only=True)
class HiRA(WeightMethod):
    """A low-rank matrix that multiplies each element of linear, conv and embedding weights.

    Args:
        r: the rank.
        hira_dropout: dropout on the adapter's input in training; embeddings have none, as in HF PEFT.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        init_weights: True (Kaiming A, zero B) and "gaussian" start as the identity; False starts at random.
        rank_pattern: another `r` for module paths that match a key. HF PEFT's `HiraConfig` has this option, and a first
            adapter of HF PEFT (0.21) has the rank `r` everywhere: configs are read in that way.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.HiRA(r=16, target="mlp"))
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    peft_type: ClassVar[str] = "HIRA"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    ignored: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_ranks(self.r, self.rank_pattern, "HiRA")

    @property
    def neutral(self) -> bool:
        return self.init_weights is not False

    def at(self, site: Site) -> HiRA:
        r = int(by_path(self.rank_pattern, "rank_pattern", site.path, self.r))
        return dataclasses.replace(self, r=r, rank_pattern={})

    def gather(self, methods: Mapping[str, Method]) -> HiRA:
        ranks = {m.r for m in methods.values() if isinstance(m, HiRA)} or {self.r}
        r = self.r if len(ranks) > 1 else ranks.pop()
        return dataclasses.replace(self, r=r, rank_pattern=pattern_of(methods, "r", r))

    def as_saved(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[HiRA, str]:
        """Return the rule with the ranks of the file's tensors: of HF PEFT's adapters, a later one has other ranks."""
        named = {name.rpartition("."): shape for name, shape in shapes.items()}
        ranks = {path: shape[0] for (path, _, leaf), shape in named.items() if leaf in (A, A_EMBEDDING) and shape}
        return dataclasses.replace(self, rank_pattern=path_pattern(ranks, self.r)), ""

    @property
    def unloadable(self) -> str:
        return "it gives each module the rank r, and these modules have others" if self.rank_pattern else ""

    def keys(self, site: Site) -> dict[str, str]:
        return {A: A_EMBEDDING, B: "hira_embedding_B"} if site.kind == "embedding" else {A: A, B: B}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        if site.groups > 1:
            raise PeftfxError("HiRA does not act on convs of several groups", site.path, "exclude this module")
        out, inner = base.weight.shape[:2][:: -1 if site.kind == "embedding" else 1]
        kernel = base.weight.shape[2:]
        like = torch.zeros((), dtype=adapter_dtype(base.weight.dtype), device=base.weight.device)
        p = {A: like.new_zeros(self.r, inner, *kernel), B: like.new_zeros(out, self.r, *(1,) * len(kernel))}
        if self.init_weights is False:
            return {name: t.normal_(generator=rng) for name, t in p.items()}
        if site.kind == "embedding":
            p[B].normal_(generator=rng)
        elif self.init_weights == "gaussian":
            p[A].normal_(std=1 / self.r, generator=rng)
        else:
            p[A].uniform_(-1, 1, generator=rng).mul_(p[A][0].numel() ** -0.5)
        return p

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        delta = self._delta(site, base.weight, p)
        if site.kind == "embedding":
            return (y + op(x, delta)).to(y.dtype)
        return (y + op(dropped(x, self.hira_dropout, training).to(delta.dtype), delta)).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return self.fold_over(site, base, base, p)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        """Return the fold over earlier methods. As in `forward`, the factors multiply the base's weight."""
        return Base(under.weight + self._delta(site, base.weight, p), under.bias)

    def by_row(self, site: Site) -> frozenset[str] | None:
        return frozenset({B}) if site.kind == "linear" else None

    def _delta(self, site: Site, weight: Tensor, p: Params) -> Tensor:
        return weight * product(site, p[A], p[B])

    @torch.no_grad()
    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[HiRA, dict[str, Tensor]]:
        """Stack A, and make B block-structured, for the sum of the ranks."""
        some = list(parts.values())
        ranks = [len(q[A]) for q in some]
        p = {A: torch.cat([q[A] for q in some]), B: some[0][B].new_zeros(base.weight.shape[0], sum(ranks))}
        for (rows, q), block in zip(parts.items(), p[B].split(ranks, 1), strict=True):
            block[row_index(rows)] = q[B]
        return dataclasses.replace(self, r=sum(ranks)), p
