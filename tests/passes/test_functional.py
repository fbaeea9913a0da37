"""Writes in place: those that nothing else can see become operators that return the result; the others stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._ops import OpOverload

import peftfx
from peftfx.export import to_onnx
from peftfx.export.metadata import ENGINE
from peftfx.graph.graph import Graph
from peftfx.options import FAST
from peftfx.passes import Cleanup

#: What a step makes of two earlier values, all of [3, 3]: new tensors, views, and writes into the first.
STEPS = {
    "sum": lambda a, b: a + b,
    "double": lambda a, _: a * 2,
    "times one": lambda a, _: a * 1,
    "turned": lambda a, _: a.transpose(0, 1),
    "reshaped": lambda a, _: a.reshape(3, 3),
    "grown": lambda a, b: a.add_(b.clone()),
    "scaled": lambda a, _: a.mul_(3),
    "row written": lambda a, b: (a[1].copy_(b[0].clone()), a)[1],
    "columns written": lambda a, b: (a[:, 0::2].copy_(b[0, 0].clone()), a)[1],
    "corner zeroed": lambda a, _: (a[1:].transpose(0, 1)[:2].zero_(), a[1:][:, 1:].mul_(2), a)[2],
    "constant": lambda *_: torch.tensor([[1.0, 2.0, 3.0]] * 3),
    "normed": lambda a, _: nn.functional.layer_norm(a, (3,)),
    "typed alike": lambda a, b: a.type_as(b),
    "turned and written": lambda a, _: (a.transpose(0, 1).mul_(torch.tensor([1.0, 2.0, 4.0])), a)[1],
}


class Program(nn.Module):
    """Does the steps one after another, and returns the last values."""

    def __init__(self, steps: list[tuple[str, int, int]], last: int = 99) -> None:
        super().__init__()
        self.steps, self.last = steps, last

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x, x + 1]
        for name, first, second in self.steps:
            values.append(STEPS[name](values[first % len(values)], values[second % len(values)]))
        return tuple(value + 0.5 for value in values[-self.last :])


def written(graph: Graph) -> int:
    targets = (node.target for node in graph.nodes())
    return sum(isinstance(target, OpOverload) and target._schema.is_mutable for target in targets)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7)
)
@example([("times one", 0, 0), ("scaled", 0, 0)])  # a copy is not what is written later
def test_no_value_changes_and_no_input_either(steps: list[tuple[str, int, int]]) -> None:
    graph = peftfx.capture(Program(steps).eval(), {"x": torch.zeros(3, 3)}, axes={"x": (None, None)})
    clean = Cleanup()(graph).graph
    for _ in range(2):  # nothing of the graph's own is written into
        x = torch.randn(3, 3)
        given_x, clean_x = x.clone(), x.clone()
        for want, got in zip(graph.run(given_x), clean.run(clean_x), strict=True):
            assert torch.equal(want, got)
        assert torch.equal(given_x, clean_x)


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([("grown", 1, 0), ("scaled", 1, 0)], 0),  # twice into one new tensor
        ([("grown", 1, 0), ("turned", 1, 0)], 0),  # a view that is made after the write
        ([("row written", 1, 0), ("columns written", 2, 0)], 0),  # parts of a new tensor
        ([("turned", 1, 0), ("scaled", 2, 0)], 1),  # the tensor that was written through a view is read later
        ([("normed", 0, 0), ("scaled", 2, 0)], 0),  # a norm's result is new
        ([("typed alike", 0, 1), ("scaled", 1, 0)], 0),  # a type is read, and no memory
        ([("typed alike", 1, 0), ("scaled", 1, 0)], 0),  # the tensor itself, which both names show
        ([("scaled", 0, 0)], 1),  # an input
        ([("scaled", 0, 0), ("grown", 2, 1)], 2),  # an input by another name: the result of a write that stays
    ],
)
def test_what_stays_is_what_another_name_shows(steps: list[tuple[str, int, int]], left: int) -> None:
    graph = peftfx.capture(Program(steps).eval(), {"x": torch.zeros(3, 3)}, axes={"x": (None, None)})
    assert written(graph)
    assert written(Cleanup()(graph).graph) == left


class Masks(nn.Module):
    """A mask of booleans that is changed by the operators `|=`, `&=` and `^=`."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        mask |= x < -1
        mask &= x < 2
        mask ^= x > 1.5
        return x * mask


def test_operators_of_python_that_write_are_replaced() -> None:
    graph = peftfx.capture(Masks().eval(), {"x": torch.zeros(3, 3)})
    clean = Cleanup()(graph).graph
    assert (written(graph), written(clean)) == (3, 0)
    x = torch.randn(7, 5)
    assert torch.equal(clean.run(x)[0], Masks()(x))
    assert to_onnx(graph).metadata_props[ENGINE] == FAST
