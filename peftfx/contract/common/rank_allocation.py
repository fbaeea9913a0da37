"""AdaLoRA's rank allocation: a budget of ranks, and which ranks are kept (arXiv:2303.10512, section 3.2).

A rank of a module is a triplet: a row of A, a singular value, a column of B. The importance of each number is
`|p * gradient|`, averaged over the steps (`I`). Its uncertainty is the distance from that average, also averaged (`U`).
A triplet's score is `I U` of its singular value, plus the means of `I U` over its row and its column. While the budget
shrinks, the triplets with the lowest scores of all modules get a singular value of 0, and so many ranks are left:

    b(step) = target + (start - target) (1 - (step - tinit) / (total_step - tfinal - tinit))^3

Until `total_step - tfinal` all triplets go on being trained, and a triplet can come back. Then the kept triplets are
final. All this is as in HF PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peftfx.contract.common.low_rank import A, B
from peftfx.contract.kept import Kept
from peftfx.errors import PeftfxError
from peftfx.sharding.parts import full, is_under_zero, overwrite

E = "lora_E"
KEPT = "lora_E_kept"  #: which singular values the allocator kept
IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"
REMEMBERED = frozenset({KEPT} | {f"{name}_{kind}" for name in (A, B, E) for kind in (IMPORTANCE, UNCERTAINTY)})


class _Schedule(Protocol):
    """A rule with a budget of ranks. `AdaLoRA` documents the fields."""

    @property
    def target_r(self) -> int: ...
    @property
    def tinit(self) -> int: ...
    @property
    def tfinal(self) -> int: ...
    @property
    def deltaT(self) -> int: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def total_step(self) -> int | None: ...


@torch.no_grad()
def allocate(rule: _Schedule, places: Sequence[Kept], step: int) -> None:
    """Add this step's gradients to the importance averages, and keep only the ranks of the step's budget.

    Raises:
        PeftfxError: the rule has no `total_step`, or a parameter has no gradient.
    """
    if rule.total_step is None:
        hint = "give total_step and tfinal: AdaLoRA(total_step=1000, tfinal=100)"
        raise PeftfxError("AdaLoRA needs the number of steps to spend its budget", "total_step", hint)
    end = rule.total_step - rule.tfinal
    if step < end:
        for place in places:
            _note(place, rule)
    if step == end or (rule.tinit < step < end and step % rule.deltaT == 0):
        _keep_best(places, budget(rule, step, [len(place.params()[E]) for place in places]))
    if step == end:
        for place in places:
            place.forget(REMEMBERED - {KEPT})
    if step > end:
        for place in places:
            _mask(place)


def budget(rule: _Schedule, step: int, start: Sequence[int]) -> int:
    """Return how many ranks all modules share at `step`, after `tinit`, given how many each module started with."""
    assert rule.total_step is not None
    whole, target = sum(start), rule.target_r * len(start)
    left = 1 - (step - rule.tinit) / (rule.total_step - rule.tfinal - rule.tinit)
    return int((whole - target) * left**3 + target)


def _note(place: Kept, rule: _Schedule) -> None:
    """Add this step's gradients to a place's averages."""
    before = place.remembered()
    for name, p in place.params().items():
        if p.grad is None and is_under_zero(p):
            what = "DeepSpeed's ZeRO keeps the gradient of this parameter, so AdaLoRA cannot measure which ranks matter"
            raise PeftfxError(what, f"{place.key}.{name}", "train AdaLoRA with DDP or FSDP2, or use LoRA with ZeRO")
        if p.grad is None:
            hint = "call it after loss.backward() and before gradients are zeroed"
            raise PeftfxError("the parameter has no gradient", f"{place.key}.{name}", hint)
        now = (p * p.grad).abs()
        importance = before.get(f"{name}_{IMPORTANCE}", torch.zeros_like(p))
        importance = rule.beta1 * importance + (1 - rule.beta1) * now
        varied = (now - importance).abs()
        uncertainty = before.get(f"{name}_{UNCERTAINTY}", torch.zeros_like(p))
        uncertainty = rule.beta2 * uncertainty + (1 - rule.beta2) * varied
        place.remember(f"{name}_{IMPORTANCE}", importance)
        place.remember(f"{name}_{UNCERTAINTY}", uncertainty)


def _keep_best(places: Sequence[Kept], count: int) -> None:
    """Keep the `count` triplets with the best scores. Triplets that equal the limit are not kept."""
    scores = [_scores(place) for place in places]
    everything = torch.cat(scores)
    gone = len(everything) - count
    limit = torch.kthvalue(everything, gone)[0] if gone > 0 else everything.new_tensor(-1.0)
    for place, score in zip(places, scores, strict=True):
        place.remember(KEPT, score > limit)
        _mask(place)


def _scores(place: Kept) -> Tensor:
    """Return the score of each triplet of a module."""
    seen = place.remembered()
    if f"{E}_{IMPORTANCE}" not in seen:
        raise PeftfxError(
            "no step has measured yet which ranks matter", place.key, "call update_and_allocate in every step"
        )
    a, e, b = (full(seen[f"{n}_{IMPORTANCE}"] * seen[f"{n}_{UNCERTAINTY}"]) for n in (A, E, B))
    return e.flatten() + (a.mean(1) + b.mean(0))


def _mask(place: Kept) -> None:
    kept = place.remembered().get(KEPT)
    if kept is not None:
        values = place.params()[E]
        overwrite(values, full(values).masked_fill(~kept[:, None], 0.0))
