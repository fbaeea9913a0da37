"""Rank allocation: AdaLoRA's budget of ranks, and which of them it is spent on (arXiv:2303.10512, section 3.2).

A rank of a module is a triplet: a row of A, a singular value, a column of B. How much each number matters is
`|p * gradient|`, averaged over the steps (`I`), and so is how far it varies from its average (`U`). A triplet's score
is `I U` of its singular value, and the means of `I U` over its row and its column. In the budget's phase the triplets
with the lowest scores, of all modules together, have their singular values set to 0, as many as leave

    b(step) = target + (start - target) (1 - (step - tinit) / (total_step - tfinal - tinit))^3

They go on being trained, and can come back, until `total_step - tfinal`; what is kept then stays. All as in HF PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError
from peftfx.methods.adalora import KEPT, A, AdaLoRA, B, E

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"


@torch.no_grad()
def allocate(adapters: Iterable[Adapter], step: int) -> None:
    """Note what matters in this step's gradients, and keep to the step's budget, of each rule that has one.

    Raises:
        PeftfxError: no rule has a budget, or there are no gradients.
    """
    rules = [(a, rule) for a in adapters for rule in a.placed if isinstance(rule.method, AdaLoRA)]
    if not rules:
        raise PeftfxError("no active rule has a budget of ranks", "update_and_allocate", "AdaLoRA has one")
    for adapter, rule in rules:
        assert isinstance(rule.method, AdaLoRA)
        _allocate(adapter, rule.method, rule.placements, step)


def _allocate(adapter: Adapter, rule: AdaLoRA, placed: Sequence[Placement], step: int) -> None:
    if rule.total_step is None:
        hint = "say how long the training is: AdaLoRA(total_step=1000, tfinal=100)"
        raise PeftfxError("there is no budget without a schedule", "total_step", hint)
    end = rule.total_step - rule.tfinal
    if step < end:
        for placement in placed:
            _note(adapter, placement, rule)
    if step == end or (rule.tinit < step < end and step % rule.deltaT == 0):
        _keep_best(adapter, placed, budget(rule, step, _start(adapter, placed)))
    if step == end:
        for placement in placed:
            _forget(adapter, placement)
    if step > end:
        for placement in placed:
            _mask(adapter, placement)


def budget(rule: AdaLoRA, step: int, start: Sequence[int]) -> int:
    """How many ranks all modules share at a step after `tinit`, given how many each started with."""
    assert rule.total_step is not None
    whole, target = sum(start), rule.target_r * len(start)
    left = 1 - (step - rule.tinit) / (rule.total_step - rule.tfinal - rule.tinit)
    return int((whole - target) * left**3 + target)


def _start(adapter: Adapter, placed: Sequence[Placement]) -> list[int]:
    return [len(adapter.params(p)[E]) for p in placed]


def _note(adapter: Adapter, placement: Placement, rule: AdaLoRA) -> None:
    """Add this step to the averages."""
    for name, p in adapter.params(placement).items():
        if p.grad is None:
            hint = "call it after loss.backward() and before gradients are zeroed"
            raise PeftfxError("there is no gradient", f"{placement.key}.{name}", hint)
        now = (p * p.grad).abs()
        importance = rule.beta1 * _remembered(adapter, placement, f"{name}_{IMPORTANCE}", p) + (1 - rule.beta1) * now
        varied = (now - importance).abs()
        uncertainty = rule.beta2 * _remembered(adapter, placement, f"{name}_{UNCERTAINTY}", p)
        adapter.put(f"{placement.key}.{name}_{IMPORTANCE}", importance, trained=False)
        adapter.put(f"{placement.key}.{name}_{UNCERTAINTY}", uncertainty + (1 - rule.beta2) * varied, trained=False)


def _remembered(adapter: Adapter, placement: Placement, name: str, like: Tensor) -> Tensor:
    return adapter.all_of(placement).get(name, torch.zeros_like(like))


def _keep_best(adapter: Adapter, placed: Sequence[Placement], count: int) -> None:
    """Keep so many triplets; of equals at the limit, none."""
    scores = [_scores(adapter, p) for p in placed]
    everything = torch.cat(scores)
    gone = len(everything) - count
    limit = torch.kthvalue(everything, gone)[0] if gone > 0 else everything.new_tensor(-1.0)
    for placement, score in zip(placed, scores, strict=True):
        adapter.put(f"{placement.key}.{KEPT}", score > limit, trained=False)
        _mask(adapter, placement)


def _scores(adapter: Adapter, placement: Placement) -> Tensor:
    """The score of each triplet of a module."""
    seen = adapter.all_of(placement)
    if f"{E}_{IMPORTANCE}" not in seen:
        raise PeftfxError("it is not known yet what matters", placement.key, "call update_and_allocate in every step")
    a, e, b = (seen[f"{n}_{IMPORTANCE}"] * seen[f"{n}_{UNCERTAINTY}"] for n in (A, E, B))
    return e.flatten() + (a.mean(1) + b.mean(0))


def _mask(adapter: Adapter, placement: Placement) -> None:
    seen = adapter.all_of(placement)
    if KEPT in seen:
        seen[E].masked_fill_(~seen[KEPT][:, None], 0.0)


def _forget(adapter: Adapter, placement: Placement) -> None:
    holder = adapter.get_submodule(placement.key)
    for name in placement.method.remembered() - {KEPT}:
        if name in holder._buffers:
            delattr(holder, name)
