"""Contracts of graphs and passes: what lint finds, what passes require and ensure, and passes as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.zoo import Captured
from torch import Tensor, fx, nn

import peftfx
from peftfx import PeftfxError
from peftfx.export.translation.to_onnx import ENGINE, to_onnx
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import REPLACES, Rewriter
from peftfx.passes import Cleanup, Evaluate, Fuse, Merge, Pass, PassManager, PassResult, Remove, parse_pass
from peftfx.passes.base import output_nodes
from peftfx.passes.slots.open import Open
from peftfx.views.capture import capture


@pytest.fixture
def case(captured: Callable[[str], Captured]) -> Captured:
    return captured("llama")


@pytest.fixture(scope="module")
def adapted() -> peftfx.AdaptedModel:
    """A LoRA at the head, beside an attention method whose projections it adapts too."""
    from support.zoo import ZOO

    rules = [peftfx.LlamaAdapter(adapter_len=3), peftfx.LoRA(r=2, target="head | attention.key | attention.value")]
    model = peftfx.transform(ZOO["llama"].build(), rules, seed=0)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.normal_(std=0.1)
    return model


def edited(graph: Graph, edit: Callable[[Any, fx.Node], object]) -> Graph:
    """A copy of a graph after an edit by hand, of its fx graph and the last operation in it."""
    new = graph.clone()
    edit(new.module.graph, [n for n in new.nodes() if n.op == "call_function"][-1])
    return new


def _no_value(graph: fx.Graph, last: fx.Node) -> None:
    with graph.inserting_after(last):
        twice = graph.call_function(torch.ops.aten.mul.Tensor, (last, 2))
    last.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


def _lost_tensor(graph: fx.Graph, last: fx.Node) -> None:
    next(iter(graph.find_nodes(op="get_attr"))).target = "adapters.gone.weight"


def _one_output_more(graph: fx.Graph, last: fx.Node) -> None:
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], last),)


def _one_input_more(graph: fx.Graph, last: fx.Node) -> None:
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("more")


def _too_early(graph: fx.Graph, last: fx.Node) -> None:
    next(iter(graph.nodes)).prepend(last)


def _one_name(graph: fx.Graph, last: fx.Node) -> None:
    last.name = next(iter(graph.nodes)).name


def _lost_place(graph: fx.Graph, last: fx.Node) -> None:
    next(node for node in graph.nodes if REPLACES in node.meta).meta[REPLACES] = "gone"


@dataclass(frozen=True)
class Wrong(Pass):
    """Edits by hand, against a contract."""

    edit: Callable[[fx.Graph, fx.Node], None]

    def __call__(self, graph: Graph) -> PassResult:
        return PassResult(edited(graph, self.edit), 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_no_value, r"Wrong.* left a graph that is not sound: %mul.* has no value: its meta has no 'val'"),
        (_lost_tensor, r"reads adapters\.gone\.weight, and the graph holds no such tensor"),
        (_one_output_more, "the graph returns 2 values, and tells of 1"),
        (_one_input_more, "the graph has 3 placeholders, and tells of 2 inputs"),
        (_too_early, r"Wrong.* left a graph that is not sound: %.* uses %.* before it is made"),
        (_one_name, "two nodes have one name"),
    ],
)
def test_a_wrong_pass_is_told_what_it_broke(
    case: Captured, edit: Callable[[fx.Graph, fx.Node], None], message: str
) -> None:
    with pytest.raises(PeftfxError, match=message):
        PassManager([Wrong(edit)])(case.graph)


@dataclass(frozen=True)
class Inlines(Pass):
    """Puts a copy in the place of a head's operation, and tells nobody."""

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        nodes = {node.name: node for node in new.nodes()}
        head = nodes[next(site for site in new.sites if site.role == "head").calls[0].op]
        made = Rewriter(new.module.graph).before(head).copy(head, {})
        head.replace_all_uses_with(made)
        new.module.graph.erase_node(head)
        return PassResult(new, 1)


def test_a_call_of_a_node_that_is_gone_is_told(case: Captured) -> None:
    with pytest.raises(PeftfxError, match=r"a call of this site names a node that is no longer there: its op.*lm_head"):
        PassManager([Inlines()])(case.graph)


@dataclass(frozen=True)
class Nothing(Pass):
    """Says that it merges, and does nothing."""

    ensures = ("merged",)

    def __call__(self, graph: Graph) -> PassResult:
        return PassResult(graph, 0)


@dataclass(frozen=True)
class Asks(Nothing):
    requires = ("mergd",)


@dataclass(frozen=True)
class Values(Nothing):
    """Says that it leaves no weight to compute."""

    ensures = ("evaluated",)


def _in_training(graph: Graph) -> Graph:
    new = graph.clone()
    new.training = True
    return new


def test_what_passes_require_and_ensure_is_checked_by_name(adapted: peftfx.AdaptedModel) -> None:
    graph = adapted.graph()
    with pytest.raises(PeftfxError, match="Nothing did not do what it says: the graph is not 'merged': it reads adap"):
        PassManager([Nothing()])(graph)
    with pytest.raises(PeftfxError, match=r"Open cannot run: the graph is not 'bare': .*is an adapter's"):
        PassManager([Open()])(graph)
    with pytest.raises(PeftfxError, match=r"Merge cannot run: the graph is not 'intact': .* which is gone"):
        PassManager([Wrong(_lost_place), Merge()])(graph)
    with pytest.raises(PeftfxError, match=r"Values did not do what it says: the graph is not 'evaluated': .* no value"):
        PassManager([Merge(), Values()])(graph)
    with pytest.raises(
        PeftfxError, match="Open cannot run: the graph is not 'inference': it was captured in train mode"
    ):
        PassManager([Open()])(_in_training(graph))
    with pytest.raises(PeftfxError, match=r"there is no property 'mergd'.*\n.*merged"):
        PassManager([Asks()])(graph)


def test_managers_nest_and_are_passes(adapted: peftfx.AdaptedModel) -> None:
    inner = PassManager([Merge(), Evaluate()], check="metadata")
    result = PassManager([inner, Cleanup()])(adapted.graph())
    assert isinstance(result, PassResult)
    assert result.changed > 0
    assert [t.name for t in inner.timings] == ["Merge", "Evaluate"]
    assert (inner.requires, inner.ensures, inner.preserves) == (("intact",), ("evaluated",), True)


def test_a_pass_is_its_text(case: Captured) -> None:
    attentions = case.graph.sites.headed[:1]
    passes = [
        *(Merge(), Remove(), Remove("x'y"), Cleanup(), Fuse(), Open(("a", "b"), ("b",)), Open(beside=attentions)),
        PassManager([Merge(), PassManager([Evaluate()], check="none"), Remove(name="a")], tolerance=0.5),
    ]
    for step in passes:
        assert parse_pass(str(step)) == step, str(step)
    assert str(Remove("x")) == "Remove(name='x')"
    assert str(PassManager([Merge(), Evaluate()], "none")) == "PassManager(passes=(Merge, Evaluate), check='none')"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Merg", r"there is no pass 'Merg'.*\n.*Merge"),
        ("Remove(nam='x')", r"Remove has no option 'nam'.*\n.*name"),
        ("Prefill(left=...)", "left of Prefill is no text"),
        ("Prefill", "Prefill needs the option 'left'"),
        ("Remove('x')", "options are given by name"),
        ("Remove(", "this is no pass"),
        ("3", "expected the name of a pass"),
        ("Remove(name=open('x').read())", "neither a literal nor a pass"),
    ],
)
def test_a_text_that_is_no_pass_is_refused(text: str, message: str) -> None:
    with pytest.raises(PeftfxError, match=message):
        parse_pass(text)


class Plain(nn.Module):
    """Attention without heads: over [batch, length, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).to(x.dtype))


def test_attention_without_heads_takes_the_fast_road() -> None:
    graph = capture(Plain().eval(), {"x": torch.randn(2, 5, 8)})
    assert to_onnx(graph).metadata_props[ENGINE] == "fast"


def test_behind_cleanup_slots_open_and_adapters_go_in_at_a_head(adapted: peftfx.AdaptedModel) -> None:
    graph, feed = adapted.graph(), list(adapted.example.values())
    clean = PassManager([Cleanup(), Remove()])(graph).graph
    assert clean.text() == Cleanup()(Remove()(graph).graph).graph.text()
    head = next(site.path for site in clean.sites if site.role == "head")
    opened = PassManager([Open((head,))])(clean).graph
    rank = torch.zeros(32, 0), torch.zeros(0, 99), torch.ones(99)
    for want, got in zip(clean.run(*feed), opened.run(*feed, *rank), strict=True):
        torch.testing.assert_close(got, want)
    again = peftfx.passes.Insert("default", adapted.adapter("default"))(clean).graph
    again.lint()
    for want, got in zip(graph.run(*feed), again.run(*feed), strict=True):
        torch.testing.assert_close(got, want)


def test_behind_merge_no_call_dangles(adapted: peftfx.AdaptedModel) -> None:
    merged = PassManager([Merge()])(adapted.graph()).graph
    names = {node.name for node in merged.nodes()}
    assert {name for site in merged.sites for call in site.calls for name in (call.x, call.op, call.y)} <= names


def test_what_a_pass_took_the_calls_of_is_refused_and_not_lost(case: Captured) -> None:
    opened = Open(tuple(site.path for site in case.graph.sites if site.kind == "linear"))(case.graph).graph
    model = peftfx.transform(case.entry.build(), peftfx.LoRA(r=2, target="head"))
    opened.module.add_module("adapters", model.adapters)
    with pytest.raises(PeftfxError, match="a pass took the calls of this site out of the graph"):
        peftfx.passes.Insert("default", model.adapter("default"))(opened)


def test_operands_that_share_a_value_are_told_apart(case: Captured) -> None:
    new = case.graph.clone()
    rewriter, last = Rewriter(new.module.graph), output_nodes(new)[0]
    at = rewriter.after(last)
    one, two = (at.trace(lambda x: x * 2, last, key="twice") for _ in range(2))  # from one trace: one value
    assert one.meta["val"] is two.meta["val"]
    three = at.trace(lambda x: x.exp(), two)
    made = at.trace(lambda x, y: x - 3 * y, one, two, key="apart")
    assert set(made.all_input_nodes) | {n for m in made.all_input_nodes for n in m.all_input_nodes} >= {one, two}
    assert three.all_input_nodes == [two]
