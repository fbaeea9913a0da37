"""AdaLoRA: a low-rank update whose ranks are kept where they matter most (Zhang et al. 2023, arXiv:2303.10512).

The update is kept as a singular value decomposition, `s B diag(E) A` with `s = lora_alpha / (init_r + 1e-5)`, and
`forward` is `y + s B(E * A(dropout(x)))`. In training, a term in the loss keeps the rows of `A` and the columns of `B`
near orthonormal, and the singular values that matter least are set to 0: see `peftfx.contract.common.rank_allocation`.
At a conv, the columns of `A` include the kernel's places, and the update is a kernel of the conv's own size.

Files hold the ranks that are left. `rank_pattern` says for each module which of `init_r` ranks were kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype, row_index
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.common.low_rank import A, B, padding_in_peft
from peftfx.contract.common.rank_allocation import KEPT, REMEMBERED, E, allocate
from peftfx.contract.kept import Kept
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site

_SMALL = 1e-5  #: HF PEFT's small constant in the scale


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(WeightMethod):
    """Low-rank adaptation of linear and conv weights, with one budget of ranks for all weights.

    Args:
        target_r: the average rank of a module in the end.
        init_r: the rank of each module at the start.
        tinit, tfinal: how many steps there are before ranks are removed, and after.
        deltaT: how many steps lie between two removals of ranks.
        beta1, beta2: the decay of the averages of importance, and of its uncertainty.
        orth_reg_weight: the weight of the loss term that keeps `A` and `B` orthonormal.
        total_step: the steps of the whole training. Without it no ranks can be removed.
        rank_pattern: by `<module path>.lora_E`, which of `init_r` ranks are left.
        lora_alpha: numerator of the scale.
        lora_dropout: dropout on the adapter's input in training.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (lora_only).
        init_lora_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> rule = peftfx.AdaLoRA(init_r=12, target_r=8, total_step=1000, tinit=100, tfinal=500)
        >>> adapted = peftfx.transform(model, rule)
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool = True

    peft_type: ClassVar[str] = "ADALORA"
    default_target: ClassVar[str] = "attention.query | attention.value"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    schedule: ClassVar[frozenset[str]] = frozenset(
        {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"}
    )
    ignored: ClassVar[frozenset[str]] = frozenset({"r", "use_rslora", "alpha_pattern", "lora_bias"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "init_r", "target_r", "deltaT")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise PeftfxError(
                    f"{name} must be between 0 and 1, not {getattr(self, name)}", name, f"AdaLoRA({name}=0.85)"
                )
        if self.lora_alpha <= 0 or self.orth_reg_weight < 0:
            what = "lora_alpha must be above 0, and orth_reg_weight must be 0 or more"
            hint = "AdaLoRA(lora_alpha=8, orth_reg_weight=0.5)"
            raise PeftfxError(what, "lora_alpha, orth_reg_weight", hint)
        if self.total_step is not None and not 0 <= self.tinit < self.total_step - self.tfinal:
            hint = "tinit + tfinal must be less than total_step"
            raise PeftfxError("this schedule leaves no steps in which ranks are cut", "total_step", hint)
        given = self.rank_pattern or {}
        wrong = [name for name, kept in given.items() if f".{E}" not in name or len(kept) != self.init_r]
        if wrong:
            hint = f"under <module path>.{E}, init_r ({self.init_r}) times true or false"
            raise PeftfxError("it does not say of each rank whether it is kept", f"rank_pattern: {wrong[0]}", hint)
        # While it trains, HF PEFT's pattern ends with the adapter's name.
        pattern = {_key(name.rpartition(f".{E}")[0]): tuple(kept) for name, kept in given.items()}
        object.__setattr__(self, "rank_pattern", pattern)

    @property
    def neutral(self) -> bool:
        return bool(self.init_lora_weights)

    @property
    def scaling(self) -> float:
        """The factor `s`. It stays the same when ranks are removed."""
        return self.lora_alpha / (self.init_r + _SMALL)

    def at(self, site: Site) -> AdaLoRA:
        """Return this method with the number of ranks left at this site. Which ranks they are does not matter there."""
        kept = self.rank_pattern.get(_key(site.path))
        return self._left(None if kept is None else sorted(kept, reverse=True))

    def _left(self, kept: Sequence[bool] | None) -> AdaLoRA:
        return dataclasses.replace(self, rank_pattern={} if kept is None else {_key(""): kept})

    @property
    def left(self) -> tuple[bool, ...]:
        """The flags of the ranks that are left, for a method that is configured for a site by `at`."""
        return tuple(self.rank_pattern.get(_key(""), (True,) * self.init_r))

    @property
    def _rank(self) -> int:
        """The number of ranks that are left. No tuple is made for it, as a file may give any number."""
        kept = self.rank_pattern.get(_key(""))
        return self.init_r if kept is None else sum(kept)

    def remembered(self) -> frozenset[str]:
        return REMEMBERED

    def adjust(self, places: Sequence[Kept], step: int) -> None:
        allocate(self, places, step)

    def keys(self, site: Site) -> dict[str, str]:
        return {A: A, B: B, E: E}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight, rank = base.weight, self._rank
        new = functools.partial(torch.zeros, dtype=adapter_dtype(weight.dtype), device=weight.device)
        p = {A: new(rank, weight[0].numel()), E: new(rank, 1), B: new(weight.shape[0], rank)}
        spread = {A: 0.02, B: 0.02, E: 0.0} if self.init_lora_weights else dict.fromkeys((A, E, B), 1.0)
        return {name: t.normal_(0, spread[name], generator=rng) for name, t in p.items()}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        drops = training and self.lora_dropout > 0
        dropped = (F.dropout(x, self.lora_dropout, training=True) if drops else x).to(p[A].dtype)
        if site.kind == "conv":
            return (y + op(dropped, self._update(base.weight, p))).to(y.dtype)
        return (y + F.linear(F.linear(dropped, self._scaled(p)), p[B])).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight + self._update(base.weight, p), base.bias)

    def by_row(self, site: Site) -> frozenset[str] | None:
        return frozenset({B}) if site.kind == "linear" else None

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if site.groups > 1:
            what, hint = "AdaLoRA on a grouped conv cannot be put into a running graph", "export the adapter merged"
            raise PeftfxError(what, site.path, hint)
        a = self._scaled(p).float()
        return Update(a=a.view(-1, *base.weight.shape[1:]), b=p[B].float())

    def apart_from_peft(self, site: Site, module: nn.Module) -> str:
        return padding_in_peft(module) if site.kind == "conv" else ""

    def _scaled(self, p: Params) -> Tensor:
        """Return `s diag(E) A`: scaling A costs least."""
        return p[A] * (p[E] * self.scaling)

    def _update(self, weight: Tensor, p: Params) -> Tensor:
        return (p[B] @ self._scaled(p)).view(weight.shape)

    def penalty(self, p: Params) -> Tensor | None:
        """Return the mean distance of A's rows and B's columns from orthonormal, times its weight."""
        if not self.orth_reg_weight:
            return None
        return self.orth_reg_weight * (_skew(p[A]) + _skew(p[B].T)) / 2

    def written(self, p: Params) -> tuple[AdaLoRA, dict[str, Tensor]]:
        """Return the method and parameters with only the ranks that the allocator kept."""
        if KEPT not in p:
            return self, dict(p)
        kept = p[KEPT]
        cut = {A: p[A][kept], E: p[E][kept], B: p[B][:, kept]}
        if len(kept) != self.init_r:  # a part of the ranks that were left when the adapter was loaded
            return self._left([i < int(kept.sum()) for i in range(self.init_r)]), cut
        return self._left(kept.tolist()), cut

    def taken_back(self, p: Params, rule: Method, saved: Params, path: str) -> dict[str, Tensor] | None:
        """Return the parameters with the ranks of a file in their places, and 0 for the ranks that it has not."""
        if not isinstance(rule, AdaLoRA) or len(p[E]) != rule.init_r or self.scaling != rule.scaling:
            return None
        kept = torch.tensor(rule.rank_pattern.get(_key(path), (True,) * rule.init_r), device=p[E].device)
        if len(saved[E]) != int(kept.sum()):
            return None
        whole = {A: p[A].clone(), E: torch.zeros_like(p[E]), B: p[B].clone(), KEPT: kept}
        whole[A][kept], whole[E][kept], whole[B][:, kept] = saved[A], saved[E], saved[B]
        return whole

    def gather(self, methods: Mapping[str, Method]) -> AdaLoRA:
        """Return a rule in which all modules start with one rank and one scale, and `rank_pattern` cuts each.

        HF PEFT loads only configs with a schedule.
        """
        own = {path: m for path, m in methods.items() if isinstance(m, AdaLoRA)}
        most = max((m.init_r for m in own.values()), default=self.init_r)
        patterns = {path: m.left + (False,) * (most - m.init_r) for path, m in own.items()}
        for path, kept in patterns.items():
            given = self.rank_pattern.get(_key(path), ())
            if sum(given) == sum(kept) and len(given) == most:
                patterns[path] = tuple(given)
        pattern = {} if all(map(all, patterns.values())) else {_key(path): kept for path, kept in patterns.items()}
        steps = self.total_step or self.tinit + self.tfinal + 1
        alpha = self.lora_alpha if most == self.init_r else self.scaling * (most + _SMALL)
        return dataclasses.replace(self, init_r=most, lora_alpha=alpha, rank_pattern=pattern, total_step=steps)

    @torch.no_grad()
    def whole(self, site: Site, base: Base, parts: Mapping[Rows, Params]) -> tuple[AdaLoRA, dict[str, Tensor]]:
        """Stack A and E, and make B block-structured. Alpha grows with the rank, so that the scale stays the same."""
        some = list(parts.values())
        ranks = [len(q[E]) for q in some]
        rank = max(self.init_r, sum(ranks))
        p = {A: torch.cat([q[A] for q in some]), E: torch.cat([q[E] for q in some])}
        p[B] = some[0][B].new_zeros(base.weight.shape[0], sum(ranks))
        for (rows, q), block in zip(parts.items(), p[B].split(ranks, 1), strict=True):
            block[row_index(rows)] = q[B]
        method = dataclasses.replace(self, init_r=rank, lora_alpha=self.scaling * (rank + _SMALL), rank_pattern={})
        return method._left([i < sum(ranks) for i in range(rank)]), p


def _skew(rows: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def _key(path: str) -> str:
    """Return HF PEFT's name of a module in `rank_pattern`."""
    return f"{path}.{E}"
