"""Poly and MHR: low-rank updates that tasks mix from shared skills (arXiv:2202.13914, arXiv:2211.03831).

The skills are `A` [skills, in, r] and `B` [skills, r, out], separately for each split of inputs and of outputs. A task
has a weight for each skill of each split, from `module_logits`. `forward` is `y + B_t A_t x / r` for a row of task `t`;
calls give the rows' tasks as `task_ids`. In training the weights are drawn from a relaxed Bernoulli distribution. A
single task can be folded into one weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

A, B, LOGITS, TASKS = "poly_lora_A", "poly_lora_B", "module_logits", "task_ids"


TAKE = "take one (--task-id N, take_task), or split_tasks"


@dataclass(frozen=True, kw_only=True)
class Poly(WeightMethod):
    """Low-rank updates of linear layers, mixed from skills by each row's task.

    Args:
        r: the rank of each skill.
        n_tasks: the number of tasks. With more than one task, calls give each row's task: `task_ids`, [batch].
        n_skills: the number of skills of each layer.
        n_splits: the number of parts of the inputs and of the outputs that mix skills by separate weights (MHR).
        poly_type: `poly` is the only type.
        init_weights: whether a new adapter starts as the identity; otherwise it starts at random.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.Poly(r=8, n_tasks=2, n_skills=4))
        >>> logits = adapted(input_ids=torch.tensor([[3, 5, 8]]), task_ids=torch.tensor([1])).logits
    """

    r: int = 8
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    poly_type: str = "poly"
    init_weights: bool = True

    peft_type: ClassVar[str] = "POLY"
    # Fused projections are adapted whole: HF PEFT's files have no parts, and so no skills for the rows of one part.
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    layered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "r", "n_tasks", "n_skills", "n_splits")
        if self.poly_type != "poly":
            raise PeftfxError(f"unknown type {self.poly_type!r}", "poly_type", "leave it out: there is 'poly' alone")

    @property
    def neutral(self) -> bool:
        return self.init_weights

    @property
    def inputs(self) -> Mapping[str, int]:
        return {TASKS: self.n_tasks}

    @property
    def unfoldable(self) -> str:
        return "" if self.n_tasks == 1 else f"Poly has {self.n_tasks} tasks, and a weight for each: {TAKE}"

    def settled(self, values: Mapping[str, int]) -> Poly:
        return dataclasses.replace(self, n_tasks=1) if TASKS in values else self

    def settle(self, p: Params, values: Mapping[str, int]) -> dict[str, Tensor]:
        return {**p, LOGITS: p[LOGITS][values[TASKS]][None]} if TASKS in values else dict(p)

    def keys(self, site: Site) -> dict[str, str]:
        return {A: A, B: B, LOGITS: f"poly_router.{LOGITS}"}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        out, inner = base.weight.shape
        if out % self.n_splits or inner % self.n_splits:
            what = f"{self.n_splits} splits do not divide {inner} inputs and {out} outputs"
            raise PeftfxError(what, site.path, "n_splits= that divides both, or leave this module out")
        new = base.weight.new_empty(0, dtype=adapter_dtype(base.weight.dtype))
        a = new.new_empty(self.n_splits, self.n_skills, inner // self.n_splits, self.r)
        b = new.new_zeros(self.n_splits, self.n_skills, self.r, out // self.n_splits)
        for t, fan in ((a, a.shape[2]),) if self.init_weights else ((a, a.shape[2]), (b, self.r)):
            t.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=rng)
        logits = new.new_empty(self.n_tasks, self.n_splits * self.n_skills).uniform_(-1e-3, 1e-3, generator=rng)
        return {A: a, B: b, LOGITS: logits}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        logits = p[LOGITS].index_select(0, p[TASKS]) if self.n_tasks > 1 else p[LOGITS]
        if training:  # HF PEFT draws for each row, also with a single task
            logits = _drawn(logits.expand(x.shape[0], -1))
        a, b = self._mixed(p, logits if training else logits.sigmoid())
        rows = x.to(a.dtype).reshape(x.shape[0], -1, x.shape[-1])
        return (y + ((rows @ a) @ b / self.r).reshape(y.shape)).to(y.dtype)

    def _mixed(self, p: Params, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Return `A` [rows, in, r] and `B` [rows, r, out], mixed by the skills' weights, which are made shares."""
        shares = chances.view(-1, self.n_splits, self.n_skills)
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-12)
        a = torch.einsum("bqs,qsdr->bqdr", shares, p[A]).flatten(1, 2)
        return a, torch.einsum("bqs,qsrd->brqd", shares, p[B]).flatten(2)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(self.update(site, base, p).apply(base.weight), base.bias)

    def update(self, site: Site, base: Base, p: Params) -> Update:
        if self.unfoldable:
            raise PeftfxError(self.unfoldable, site.path, "merge or export one of them, or serve them by row")
        a, b = self._mixed(p, p[LOGITS].sigmoid())
        return Update(a=a[0].T, b=b[0].T / self.r)


def _drawn(logits: Tensor) -> Tensor:
    """Draw from a relaxed Bernoulli distribution of temperature 1, as torch does."""
    small = torch.finfo(logits.dtype)
    chances, noise = (t.clamp(small.eps, 1 - small.eps) for t in (logits.sigmoid(), torch.rand_like(logits)))
    drawn = noise.log() - (-noise).log1p() + chances.log() - (-chances).log1p()
    return drawn.sigmoid().clamp(small.tiny, 1 - small.eps)
