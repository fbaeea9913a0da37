"""Layers that differ in what their code reads, or writes, beside weights and arguments are captured as they compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

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
LONG = [*SCALES, *[3.0] * 1000]
NAMED = {f"layer {i}": scale for i, scale in enumerate(SCALES)}


SCALE: ContextVar[float] = ContextVar("SCALE", default=1.0)
STATE = SimpleNamespace(scale=1.0)


class Outer:
    scales: ClassVar = [1.0]


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Phased:
    """An object, and a descriptor, whose code reads what is elsewhere."""

    @property
    def scale(self) -> float:
        return STATE.scale

    def __get__(self, layer: object, kind: type) -> float:
        return STATE.scale


SLOTTED, PHASED, OF_LAYERS = Slotted(), Phased(), dict[object, float]()
OF_REFERENCES: WeakKeyDictionary[object, float] = WeakKeyDictionary()


class Turned(list[float]):
    """A list that is read from its end."""

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(-1 - int(place))


TURNED = Turned(reversed(SCALES))

Code = Callable[["Layer", Tensor, Any], Any]
Run = Callable[[Sequence["Layer"], Tensor], Tensor]


class Layer(nn.Module):
    """A layer with code of its own: its result scales what the layer adds. It has nothing else that tells its scale."""

    calls = 0
    scales: list[float]

    def __init__(self, index: int, code: Code) -> None:
        super().__init__()
        self.layer_idx, self.code = index, code
        self.linear = nn.Linear(4, 4)
        self.notes: list[Tensor] = []
        self.stats: dict[str, Any] = {"mean": 0.0}

    @property
    def stated(self) -> float:
        return STATE.scale

    @staticmethod
    def within() -> float:
        return sum(scale for scale in Outer.scales[-1:])

    @property
    def made(self) -> list[float]:
        return [1.0 if i < 3 else 3.0 for i in range(COUNT)]

    def forward(self, x: Tensor, given: object = None) -> Tensor:
        y = self.linear(x).tanh()
        return x + y * self.code(self, y, given)


class Listing(Layer):
    scales = SCALES


class Describing(Layer):
    phase = PHASED


class Stack(nn.Module):
    def __init__(self, code: Code, run: Run, kind: type[Layer] = Layer, **held: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(i, code) for i in range(COUNT))
        for layer in self.layers:
            vars(layer).update(held)
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


def with_each(give: Callable[[float], object]) -> Run:
    def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
        for layer, scale in zip(layers, SCALES, strict=True):
            give(scale)
            x = layer(x)
        return x

    return run


def by_layer(note: Callable[[Layer, float], object]) -> Run:
    def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
        for layer, scale in zip(layers, SCALES, strict=True):
            note(layer, scale)
        return plain(layers, x)

    return run


def with_notes(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer, scale in zip(layers, SCALES, strict=True):
        x = x * 1
        x.scale = scale  # type: ignore[attr-defined]
        x = layer(x, x)
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


def entry_at(scales: Sequence[float], index: int) -> float:
    return scales[index]


def of_context() -> float:
    return SCALE.get()


def in_a_text(layer: Layer, y: Tensor, given: Any) -> float:
    return NAMED[f"layer {layer.layer_idx}"]


def renamed(layer: Layer, y: Tensor, given: Any) -> float:
    index = layer.layer_idx
    return layer.made[index]


LISTED: dict[str, Stack] = {
    "that is given": Stack(lambda s, y, g: g[s.layer_idx], lambda ls, x: plain(ls, x, SCALES)),
    "of tensors": Stack(lambda s, y, g: g[s.layer_idx], with_means),
    "in a dict": Stack(lambda s, y, g: s.tables["scales"][s.layer_idx], plain, tables={"scales": SCALES}),
    "of a config's part": Stack(lambda s, y, g: s.config.part.scales[s.layer_idx], plain, config=CONFIG),
    "of its class": Stack(lambda s, y, g: s.scales[s.layer_idx], plain, Listing),
    "by name": Stack(lambda s, y, g: SCALES[s.layer_idx], plain),
}
#: Uses of a number that tell nothing about other layers.
OTHERWISE: dict[str, Stack] = {
    "as a whole number": Stack(lambda s, y, g: int(s.layer_idx) // 3, plain),
    "in an array": Stack(lambda s, y, g: float(g[s.layer_idx]), lambda ls, x: plain(ls, x, np.array(SCALES))),
    "in what a config computes": Stack(kind_of, lambda ls, x: plain(ls, x, TYPES)),
    "in what a property makes": Stack(lambda s, y, g: s.made[s.layer_idx], plain),
    "in a literal": Stack(lambda s, y, g: (1, 1, 1, 3, 3, 3, 3, 3)[s.layer_idx], plain),
    "in a text": Stack(lambda s, y, g: float("11133333"[s.layer_idx]), plain),
    "in a list that turns": Stack(lambda s, y, g: g[s.layer_idx], lambda ls, x: plain(ls, x, TURNED)),
    "in a long list": Stack(lambda s, y, g: g[s.layer_idx], lambda ls, x: plain(ls, x, LONG)),
    "in a slice": Stack(lambda s, y, g: 1.0 if [1, 1, 1][s.layer_idx :] else 3.0, plain),
    "among others": Stack(lambda s, y, g: 1.0 if s.layer_idx in (0, 1, 2) else 3.0, plain),
    "written as a key": Stack(lambda s, y, g: NAMED["layer %d" % s.layer_idx], plain),  # noqa: UP031
    "in a key": Stack(in_a_text, plain),
    "handed on": Stack(lambda s, y, g: entry_at(s.made, s.layer_idx), plain),
    "handed on by a keyword": Stack(lambda s, y, g: entry_at(s.made, index=s.layer_idx), plain),
    "by another name": Stack(renamed, plain),
    "asked for": Stack(lambda s, y, g: s.made[getattr(s, "layer_idx")], plain),  # noqa: B009
    "counted to": Stack(lambda s, y, g: 1.0 if len(range(s.layer_idx)) < 3 else 3.0, plain),
    "in bits": Stack(lambda s, y, g: 3.0 if s.layer_idx.bit_length() > 2 else 1.0, plain),
}
CASES: dict[str, Stack] = {
    **{f"its number in a list {name}": stack for name, stack in LISTED.items()},
    **{f"its number {name}": stack for name, stack in OTHERWISE.items()},
    "the next of an iterator": Stack(lambda s, y, g: next(g), lambda ls, x: plain(ls, x, iter(SCALES))),
    "a list that holds itself": Stack(
        lambda s, y, g: g.own[0], lambda ls, x: plain(ls, x, SimpleNamespace(own=ITSELF))
    ),
    "what a function encloses": Stack(lambda s, y, g: g(y), with_function),
    "an object that is given": Stack(lambda s, y, g: g.scale, with_held),
    "an object that it holds": Stack(lambda s, y, g: s.held.scale, with_held, held=HELD),
    "an object by name": Stack(lambda s, y, g: s.stated, with_each(lambda scale: setattr(STATE, "scale", scale))),
    "a list of another class": Stack(lambda s, y, g: s.within(), with_each(Outer.scales.append)),
    "an object with slots": Stack(
        lambda s, y, g: s.held.scale, with_each(lambda scale: setattr(SLOTTED, "scale", scale)), held=SLOTTED
    ),
    "a property of an object": Stack(
        lambda s, y, g: s.held.scale, with_each(lambda scale: setattr(STATE, "scale", scale)), held=PHASED
    ),
    "a descriptor": Stack(lambda s, y, g: s.phase, with_each(lambda scale: setattr(STATE, "scale", scale)), Describing),
    "a note on a tensor": Stack(lambda s, y, g: g.scale, with_notes),
    "itself in a dict": Stack(lambda s, y, g: OF_LAYERS[s], by_layer(OF_LAYERS.__setitem__)),
    "itself in a dict of references": Stack(lambda s, y, g: OF_REFERENCES[s], by_layer(OF_REFERENCES.__setitem__)),
    "its identity": Stack(
        lambda s, y, g: OF_LAYERS[id(s)], by_layer(lambda layer, scale: OF_LAYERS.update({id(layer): scale}))
    ),
    "a context variable": Stack(lambda s, y, g: SCALE.get(), with_each(SCALE.set)),
    "a context variable in a function": Stack(lambda s, y, g: of_context(), with_each(SCALE.set)),
    "a tensor of an object": Stack(lambda s, y, g: g.mean, with_mean(lambda t: setattr(HELD, "mean", t))),
    "a tensor of nobody's": Stack(lambda s, y, g: OUTSIDE["mean"], with_mean(lambda t: OUTSIDE.update(mean=t))),
    "writes into its class": Stack(counted, plain),
    "writes into an object that is given": Stack(noted(lambda s, g: g.notes), noting),
    "writes into a list of its own": Stack(noted(lambda s, g: s.notes), own_notes),
    "writes into a dict of its own": Stack(stated, own_stats),
    "writes into a queue": Stack(last_one, last_ones),
}


@pytest.mark.parametrize("case", CASES)
def test_a_capture_computes_what_the_code_does(case: str) -> None:
    torch.manual_seed(0)
    model = CASES[case].eval()
    graph = capture(model, {"x": torch.randn(3, 4)}, axes={"x": ("batch", None)})
    x = torch.randn(5, 4)
    got = graph(x=x)
    torch.testing.assert_close(got, model(x))
