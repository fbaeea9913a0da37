"""The operator `peftfx::recurrent_layer`: one direction of a layer of `torch.nn.LSTM`, `GRU` or `RNN`.

torch.export splits these layers up into the steps of the example. During a capture in eval mode, each layer is one
operator for each direction, for every length, which becomes `LSTM`, `GRU` or `RNN` in ONNX. Packed sequences and
projections (`proj_size`) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FUNCTIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  #: torch's names of the functions
_VF: Any = torch._VF

Layer = tuple[Tensor, Tensor, Tensor]


def _run(x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor], kind: str, reverse: bool) -> Layer:
    """Run torch's own layer."""
    state = (hidden[None], cell[None]) if kind == "lstm" else hidden[None]
    how = (list(weights), len(weights) > 2, 1, 0.0, False, False, False)
    y, *last = getattr(torch, kind)(x.flip(0) if reverse else x, state, *how)
    h, c = last if kind == "lstm" else (*last, cell[None])
    return (y.flip(0) if reverse else y.clone()), h[0].clone(), c[0].clone()


@torch.library.custom_op("peftfx::recurrent_layer", mutates_args=())
def recurrent_layer(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction of a layer over the steps.

    Args:
        x: [steps, batch, in].
        hidden, cell: [batch, hidden], before the first step. Only an LSTM reads the cell.
        weight_ih, weight_hh: [gates * hidden, in] and [gates * hidden, hidden], with torch's order of gates.
        bias_ih, bias_hh: [gates * hidden], or None for both.
        kind: one of `FUNCTIONS`.
        reverse: whether the last step is the first.

    Returns:
        The output of each step, [steps, batch, hidden], and `hidden` and `cell` after the last step that was run.
    """
    weights = [weight_ih, weight_hh] if bias_ih is None or bias_hh is None else [weight_ih, weight_hh, bias_ih, bias_hh]
    return _run(x, hidden, cell, weights, kind, reverse)


@recurrent_layer.register_fake
def _(x: Tensor, hidden: Tensor, cell: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], hidden.shape[1]), torch.empty_like(hidden), torch.empty_like(cell)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.kind, ctx.reverse = inputs
    ctx.biased = tensors[-1] is not None
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the layer, which is run again."""
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        outputs = _run(given[0], given[1], given[2], given[3:], ctx.kind, ctx.reverse)
        found = torch.autograd.grad(outputs, given, gradients, allow_unused=True)
    return (*found, *(() if ctx.biased else (None, None)), None, None)


recurrent_layer.register_autograd(_backward, setup_context=_keep)


@contextmanager
def recurrent_layers() -> Iterator[None]:
    """Let torch's modules run `recurrent_layer` inside the context, where they draw no random numbers."""
    own = {kind: getattr(_VF, kind) for kind in FUNCTIONS}
    for kind in FUNCTIONS:
        setattr(_VF, kind, _stand_in(kind, own[kind]))
    try:
        yield
    finally:
        for kind in FUNCTIONS:
            delattr(_VF, kind)  # torch's own functions are found by `__getattr__`


def _stand_in(kind: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def layers(x: Tensor, state: Any, weights: Any, *how: Any) -> Any:
        if isinstance(how[0], bool):
            has_biases, count, dropout, training, both, batch_first = how
            each = len(weights) // (count * (2 if both else 1))
            if each == (4 if has_biases else 2) and not (training and dropout):
                return _stacked(kind, x, state, weights, both=both, batch_first=batch_first)
        return own(x, state, weights, *how)  # a packed sequence, or a projection

    return layers


def _stacked(
    kind: str, x: Tensor, state: Any, weights: Sequence[Tensor], *, both: bool, batch_first: bool
) -> tuple[Tensor, ...]:
    """Run all layers, each on the outputs of the one before."""
    hidden, cell = state if kind == "lstm" else (state, state)
    directions, last = (False, True) if both else (False,), list[tuple[Tensor, Tensor]]()
    each = len(weights) // len(hidden)
    x = x.transpose(0, 1) if batch_first else x
    for first in range(0, len(hidden), len(directions)):
        outputs = []
        for at, reverse in enumerate(directions, first):
            own: list[Tensor | None] = [*weights[at * each : (at + 1) * each], None, None]
            y, *ends = recurrent_layer(x, hidden[at], cell[at], *own[:4], kind, reverse)
            outputs.append(y)
            last.append((ends[0], ends[1]))
        x = torch.cat(outputs, -1) if both else outputs[0]
    x = x.transpose(0, 1) if batch_first else x
    return (x, *map(torch.stack, zip(*last, strict=True)))[: 3 if kind == "lstm" else 2]
