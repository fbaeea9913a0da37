"""Layers that differ in what their code reads, or writes, beside weights and arguments are captured as they compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from torch import Tensor, nn

from peftfx.views.capture import capture

pytestmark = pytest.mark.usefixtures("capture_each")

COUNT = 8
SCALES = [1.0] * 3 + [3.0] * 5  #: the first three layers are equal, and two of them would stand for the rest
CONFIG = tr.LlamaConfig()
CONFIG.part = tr.LlamaConfig()
CONFIG.part.scales = SCALES
TYPES = tr.JambaConfig(num_hidden_layers=COUNT, attn_layer_period=4, attn_layer_offset=3)
ITSELF: list[Any] = [1.0]
ITSELF.append(ITSELF)
HELD = SimpleNamespace(scale=1.0, mean=torch.zeros(()))
OUTSIDE: dict[str, Any] = {}

Code = Callable[["Layer", Tensor, Any], Any]
Run = Callable[[Sequence["Layer"], Tensor], Tensor]


class Layer(nn.Module):
    """A layer with code of its own: its result scales what the layer adds."""

    calls = 0
    scales = SCALES

    def __init__(self, index: int, code: Code) -> None:
        super().__init__()
        self.layer_idx, self.code, self.config, self.held = index, code, CONFIG, HELD
        self.linear = nn.Linear(4, 4)
        self.tables = {"scales": SCALES}
        self.notes: list[Tensor] = []
        self.stats: dict[str, Any] = {"mean": 0.0}

    def forward(self, x: Tensor, given: object = None) -> Tensor:
        y = self.linear(x).tanh()
        return x + y * self.code(self, y, given)


class Stack(nn.Module):
    def __init__(self, code: Code, run: Run) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, code) for i in range(COUNT))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        Layer.calls = 0
        return self.run(list(self.layers), x)  # type: ignore[arg-type]


def plain(layers: Sequence[Layer], x: Tensor, given: object = None) -> Tensor:
    for layer in layers:
        x = layer(x, given)
    return x


def with_means(layers: Sequence[Layer], x: Tensor) -> Tensor:
    first, second = x.mean(-1, keepdim=True), x.sum(-1, keepdim=True)
    return plain(layers, x, [first] * 3 + [second] * 5)


def with_held(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer, scale in zip(layers, SCALES, strict=True):
        HELD.scale = scale
        x = layer(x, HELD)
    return x


def with_function(layers: Sequence[Layer], x: Tensor) -> Tensor:
    scale = 1.0

    def scaled(y: Tensor) -> Tensor:
        return y * scale

    for layer, scale in zip(layers, SCALES, strict=True):  # noqa: B007
        x = layer(x, scaled)
    return x


def with_mean(held: Callable[[Tensor], object]) -> Run:
    def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
        for i, layer in enumerate(layers):
            if i % 3 == 0:
                held(x.mean(-1, keepdim=True))
            x = layer(x, HELD)
        return x

    return run


def noting(layers: Sequence[Layer], x: Tensor) -> Tensor:
    given = SimpleNamespace(notes=[])
    return plain(layers, x, given) + sum(given.notes)


def own_notes(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return plain(layers, x) + sum(note for layer in layers for note in layer.notes[-1:])


def own_stats(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return plain(layers, x) + sum(layer.stats["mean"] for layer in layers)


def last_ones(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return plain(layers, x, deque([x, x], maxlen=2))


def counted(layer: Layer, y: Tensor, given: Any) -> float:
    type(layer).calls += 1
    return 1.0 if layer.calls < 4 else 3.0


def kind_of(layer: Layer, y: Tensor, given: Any) -> float:
    return 3.0 if TYPES.layers_block_type[layer.layer_idx] == "attention" else 1.0


def noted(notes: Callable[[Layer, Any], list[Tensor]]) -> Code:
    def code(layer: Layer, y: Tensor, given: Any) -> float:
        notes(layer, given).append(y.mean(-1, keepdim=True))
        return 1.0

    return code


def stated(layer: Layer, y: Tensor, given: Any) -> float:
    layer.stats["mean"] = y.mean(-1, keepdim=True)
    return 1.0


def last_one(layer: Layer, y: Tensor, given: Any) -> Tensor:
    given.append(y)
    found: Tensor = given[0]
    return found


CASES: dict[str, tuple[Code, Run]] = {
    "its number in a list that is given": (lambda s, y, g: g[s.layer_idx], lambda ls, x: plain(ls, x, SCALES)),
    "its number in a list of tensors": (lambda s, y, g: g[s.layer_idx], with_means),
    "its number in a list in a dict": (lambda s, y, g: s.tables["scales"][s.layer_idx], plain),
    "its number in a list of a config's part": (lambda s, y, g: s.config.part.scales[s.layer_idx], plain),
    "its number as a whole number": (lambda s, y, g: int(s.layer_idx) // 3, plain),
    "its number in a list of its class": (lambda s, y, g: s.scales[s.layer_idx], plain),
    "its number in a list by name": (lambda s, y, g: SCALES[s.layer_idx], plain),
    "its number in an array": (lambda s, y, g: float(g[s.layer_idx]), lambda ls, x: plain(ls, x, np.array(SCALES))),
    "its number in what a config computes": (kind_of, lambda ls, x: plain(ls, x, TYPES)),
    "the next of an iterator": (lambda s, y, g: next(g), lambda ls, x: plain(ls, x, iter(SCALES))),
    "a list that holds itself": (lambda s, y, g: g.own[0], lambda ls, x: plain(ls, x, SimpleNamespace(own=ITSELF))),
    "what a function encloses": (lambda s, y, g: g(y), with_function),
    "an object that is given": (lambda s, y, g: g.scale, with_held),
    "an object that it holds": (lambda s, y, g: s.held.scale, with_held),
    "a tensor of an object": (lambda s, y, g: g.mean, with_mean(lambda t: setattr(HELD, "mean", t))),
    "a tensor of nobody's": (lambda s, y, g: OUTSIDE["mean"], with_mean(lambda t: OUTSIDE.update(mean=t))),
    "writes into its class": (counted, plain),
    "writes into an object that is given": (noted(lambda s, g: g.notes), noting),
    "writes into a list of its own": (noted(lambda s, g: s.notes), own_notes),
    "writes into a dict of its own": (stated, own_stats),
    "writes into a queue": (last_one, last_ones),
}


@pytest.mark.parametrize("case", CASES)
def test_a_capture_computes_what_the_code_does(case: str) -> None:
    torch.manual_seed(0)
    model = Stack(*CASES[case]).eval()
    graph = capture(model, {"x": torch.randn(3, 4)}, axes={"x": ("batch", None)})
    x = torch.randn(5, 4)
    got = graph(x=x)
    torch.testing.assert_close(got, model(x))
