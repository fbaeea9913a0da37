"""The small networks that compute soft prompts in training, in plain torch. Parameters start as in HF PEFT.

HF PEFT's layer `mlp_head.0` has the parameters `mlp_head_0_weight` and `mlp_head_0_bias` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.method import Params

EMBEDDING = "embedding_weight"  #: the network's input, one row for each virtual token
_GATES = 4  #: the number of gates of an LSTM


def embedding(like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
    """Return new rows of an embedding, shaped like `like`, drawn as torch draws them."""
    return {EMBEDDING: torch.empty_like(like).normal_(generator=rng)}


def layer(name: str, inner: int, outer: int, like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
    """Return the parameters of a new linear layer, drawn as torch draws them."""
    bound = 1 / math.sqrt(inner)
    return {
        f"{name}_weight": like.new_empty(outer, inner).uniform_(-bound, bound, generator=rng),
        f"{name}_bias": like.new_empty(outer).uniform_(-bound, bound, generator=rng),
    }


def linear(name: str, p: Params, x: Tensor) -> Tensor:
    """Apply the linear layer `name` to `x`."""
    return F.linear(x, p[f"{name}_weight"], p[f"{name}_bias"])


def perceptron(names: tuple[str, ...], p: Params, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply linear layers in turn, with an activation between each two."""
    for name in names[:-1]:
        x = activation(linear(name, p, x))
    return linear(names[-1], p, x)


def lstm(
    name: str, inner: int, hidden: int, layers: int, like: Tensor, rng: torch.Generator | None
) -> dict[str, Tensor]:
    """Return the parameters of a new bidirectional LSTM, drawn as torch draws them."""
    bound, made = 1 / math.sqrt(hidden), {}
    for key in _lstm_names(layers):
        width = 2 * hidden if not key.endswith(("l0", "l0_reverse")) else inner
        shapes = {"weight_ih": (_GATES * hidden, width), "weight_hh": (_GATES * hidden, hidden)}
        shape = shapes.get(key[:9], (_GATES * hidden,))
        made[f"{name}_{key}"] = like.new_empty(shape).uniform_(-bound, bound, generator=rng)
    return made


def run_lstm(name: str, layers: int, p: Params, x: Tensor, dropout: float, training: bool) -> Tensor:
    """Run the bidirectional LSTM along the rows of `x` and return its outputs."""
    weights = [p[f"{name}_{key}"] for key in _lstm_names(layers)]
    start = x.new_zeros(2 * layers, 1, weights[1].shape[1])
    # As torch.nn.LSTM calls it: there a trace puts an operator in its place, which has a translation to ONNX.
    y: Tensor = torch._VF.lstm(x[None], (start, start), weights, True, layers, dropout, training, True, True)[0]
    return y[0]


def _lstm_names(layers: int) -> list[str]:
    """Return torch's names of the parameters, in the order in which `torch.lstm` takes them."""
    ends = [f"l{i}{reverse}" for i in range(layers) for reverse in ("", "_reverse")]
    return [f"{kind}_{end}" for end in ends for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
