"""Passes and their manager: inputs are never changed, levels of checking find what they say, and time is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.zoo import Captured
from torch import Tensor

import peftfx
from peftfx import PeftfxError
from peftfx.export.translation.preparation import prepare
from peftfx.graph.graph import Graph
from peftfx.passes import Cleanup, Evaluate, Merge, Pass, PassManager, PassResult, Remove
from peftfx.passes.base import output_nodes


@pytest.fixture
def case(captured: Callable[[str], Captured]) -> Captured:
    return captured("llama")


@pytest.fixture
def adapted(case: Captured) -> Graph:
    """A graph with a LoRA of random values in it."""
    model = peftfx.transform(case.entry.build(), peftfx.LoRA(r=2, target="attention"), seed=0)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.normal_()
    return model.graph()


def inputs(case: Captured, batch: int = 3, sequence: int = 5) -> list[Tensor]:
    made = case.entry.inputs(batch, sequence, 2, model=case.model)
    return [made[spec.name] for spec in case.graph.inputs]


@pytest.mark.parametrize("step", [Cleanup(), Merge(), Remove()], ids=str)
def test_a_pass_leaves_its_input_as_it_was(step: Pass, adapted: Graph) -> None:
    before = adapted.text()
    result = step(adapted)
    assert result.changed > 0
    assert result.graph.text() != before
    assert adapted.text() == before


def test_cleanup_keeps_every_output_to_the_bit_and_has_nothing_left_to_do(case: Captured) -> None:
    result = Cleanup()(case.graph)
    assert len(result.graph.module.graph.nodes) == len(case.graph.module.graph.nodes) - result.changed
    feed = inputs(case)
    for want, got in zip(case.graph.run(*feed), result.graph.run(*feed), strict=True):
        assert torch.equal(want, got)
    assert Cleanup()(result.graph).changed == 0


def test_the_manager_keeps_the_time_and_the_count_of_every_pass(adapted: Graph) -> None:
    manager = PassManager([Merge(), Evaluate(), Cleanup()])
    manager(adapted)
    assert [t.name for t in manager.timings] == ["Merge", "Evaluate", "Cleanup"]
    assert all(t.seconds > 0 and t.changed > 0 for t in manager.timings)


def test_the_numeric_level_passes_what_keeps_the_outputs(case: Captured, adapted: Graph) -> None:
    merged = PassManager([Cleanup(), Cleanup()], check="numeric", inputs=inputs(case))(adapted).graph
    assert merged.outputs == adapted.outputs


@dataclass(frozen=True)
class Forgets(Pass):
    """Uses a value before it is made."""

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        calls = [n for n in new.nodes() if n.op == "call_function"]
        calls[0].prepend(calls[-1])
        return PassResult(new, 1)


@dataclass(frozen=True)
class Narrows(Pass):
    """Returns another shape."""

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        (logits,) = output_nodes(new)
        with new.module.graph.inserting_after(logits):
            half = new.module.graph.call_function(torch.ops.aten.slice.Tensor, (logits, 2, 0, 1))
        half.meta["val"] = logits.meta["val"][:, :, :1]
        logits.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)
        new.module.recompile()
        return PassResult(new, 1)


def doubled(graph: Graph) -> PassResult:
    """A graph whose one output is twice what it was, in place."""
    (logits,) = output_nodes(graph)
    with graph.module.graph.inserting_after(logits):
        twice = graph.module.graph.call_function(torch.ops.aten.mul.Tensor, (logits, 2))
    twice.meta = dict(logits.meta)
    logits.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    graph.module.recompile()
    return PassResult(graph, 1)


@dataclass(frozen=True)
class Doubles(Pass):
    """Says that it keeps the outputs, and doubles them."""

    preserves = True

    def __call__(self, graph: Graph) -> PassResult:
        return doubled(graph.clone())


def test_each_level_finds_what_the_one_below_does_not(case: Captured) -> None:
    with pytest.raises(PeftfxError, match="before it is made"):
        PassManager([Forgets()], check="lint")(case.graph)
    PassManager([Narrows()], check="lint")(case.graph)
    with pytest.raises(PeftfxError, match="Narrows changed an output from"):
        PassManager([Narrows()], check="metadata")(case.graph)
    PassManager([Doubles()], check="metadata")(case.graph)
    with pytest.raises(PeftfxError, match="Doubles changed an output by"):
        PassManager([Doubles()], check="numeric", inputs=inputs(case))(case.graph)


@dataclass(frozen=True)
class InPlace(Pass):
    """A pass that says it keeps the outputs, and doubles them in the graph that it was given."""

    preserves = True

    def __call__(self, graph: Graph) -> PassResult:
        return doubled(graph)


def test_a_pass_that_changes_its_input_is_found(case: Captured) -> None:
    with pytest.raises(PeftfxError, match="InPlace changed the graph that it was given"):
        PassManager([InPlace()], check="numeric", inputs=inputs(case))(case.graph.clone())


def test_an_error_inside_a_pass_names_the_pass(case: Captured) -> None:
    @dataclass(frozen=True)
    class Refuses(Pass):
        def __call__(self, graph: Graph) -> PassResult:
            raise PeftfxError("cannot", "here", "do otherwise")

    with pytest.raises(PeftfxError, match=r"Refuses: cannot \[here\]"):
        PassManager([Refuses()])(case.graph)


class Picked(torch.nn.Module):
    """Takes columns by constant numbers: runs of them, counted from either end, and others."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, numbers] for numbers in ([2, 3, 4], [-3, -2], [-1], [0, 2], [3, 2], [-1, 0])]


def test_gathers_of_columns_in_order_become_slices_of_the_same_columns() -> None:
    graph = peftfx.capture(Picked(), {"x": torch.zeros(2, 5)}, axes={"x": ("batch", None)})
    ready = prepare(graph)
    assert sum(node.target is torch.ops.aten.index.Tensor for node in ready.nodes()) == 3
    x = torch.randn(3, 5)
    for want, got in zip(Picked()(x), ready.run(x), strict=True):
        assert torch.equal(got, want)
