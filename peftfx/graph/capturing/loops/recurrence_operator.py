"""The operator `peftfx::recurrence`: a state that each token changes and reads, with the step

    S <- decay * S;    S <- S + key (beta * (value - key^T S))^T;    out = query^T S

if `corrected` (the delta rule). Otherwise nothing is subtracted from the value. It is a loop in torch, with gradients,
and a `Scan` in ONNX: each token costs one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Steps = tuple[Tensor, Tensor]


def _steps(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, corrected: bool) -> Steps:
    outputs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, :, None]
        key, new = k[:, t, :, :, None], v[:, t]
        if corrected:
            new = new - (key * state).sum(-2)
        state = state + key * (new * beta[:, t, :, None])[..., None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state.clone()


@torch.library.custom_op("peftfx::recurrence", mutates_args=())
def recurrence(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Run a recurrence over the tokens of each row.

    Args:
        query, key: [batch, tokens, heads or 1, keys].
        value: [batch, tokens, heads, values].
        decay: [batch, tokens, heads, keys or 1], the factor of the state in each step.
        beta: [batch, tokens, heads].
        state: [batch, heads, keys, values], before the first token.
        corrected: whether a value is the target of a read (the delta rule), and not an addition to the state.

    Returns:
        What each token reads, in the shape of `value`, and the state after the last token.
    """
    return _steps(query, key, value, decay, beta, state, corrected)


@recurrence.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor, corrected: bool
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), state.new_empty(state.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.corrected = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the steps, which are run again."""
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        outputs = _steps(*given, ctx.corrected)  # type: ignore[call-arg]
        found = torch.autograd.grad(outputs, given, gradients, allow_unused=True)
    return (*found, None)


recurrence.register_autograd(_backward, setup_context=_keep)
