"""Dry runs: a model is run on fake tensors, at no cost, to find what it keeps in a cache, for any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sympy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftfx.bases.guests import own_modules
from peftfx.graph.capturing.loops.mask_loops import over_masks
from peftfx.graph.capturing.loops.recurrences import recurrences
from peftfx.graph.capturing.module_casts import casting_in_graph
from peftfx.graph.capturing.sizes.size_conditions import noted
from peftfx.graph.capturing.trace_lock import TRACING
from peftfx.graph.contexts import evaluating, fake_mode_to_run, quietly, unchanged
from peftfx.graph.lazy_weights import faked
from peftfx.views.capturing.equal_layers import equal_layers_run_twice
from peftfx.views.view import as_captured


@contextmanager
def fake_run(base: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put `base` into eval mode on fake tensors, and yield the function that makes a tensor fake."""
    mode = fake_mode_to_run(base)
    with (
        TRACING,
        quietly(),
        unchanged(base),
        faked(base),
        evaluating(base),
        as_captured(base),
        recurrences(base),  # a loop over the tokens is one operator, as in captures
        _batched_experts(base),
        casting_in_graph(),
        over_masks(),
        noted(_unset),  # where the code asserts something of such a number, it is taken as true
        torch.no_grad(),
        equal_layers_run_twice(base, own_modules),
        mode,
    ):
        yield mode.from_tensor


@contextmanager
def _batched_experts(base: nn.Module) -> Iterator[None]:
    """Compute experts by batched products inside the context: torch fakes grouped products only in bf16.

    The experts can be in a part of the model that is a model itself, for example its text model.
    """
    parts = [m for m in base.modules() if isinstance(m, PreTrainedModel) and m._can_set_experts_implementation()]
    before = [(part, part.get_experts_implementation()) for part in parts]
    for part in parts:
        part.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        for part, chosen in before:
            part.set_experts_implementation(chosen)


def _unset(expr: sympy.Basic, where: str, text: str) -> sympy.Basic | None:
    """Take a boolean that is not known for false, and a number of tokens for more than 0: caches keep the same."""
    symbols = list(expr.free_symbols)
    if expr == sympy.Eq(symbols[0], 0):
        return sympy.false
    return expr.xreplace({symbols[0]: sympy.Integer(0)}) if expr == sympy.Eq(symbols[0], 1) else None
