"""A graph's code is generated when the graph is first run or printed, and it can be copied and pickled before that."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import peftfx
from peftfx.graph.linking import link


@pytest.fixture(params=["base.weight", "base.in.class"])
def module(request: pytest.FixtureRequest) -> fx.GraphModule:
    """A graph that adds a tensor of its base to the input. The second's name has Python's keywords in it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr(request.param)
    graph.output((graph.call_function(torch.add, (x, weight)),))
    base = nn.Linear(2, 2, bias=False)
    base.add_module("in", nn.ParameterDict({"class": base.weight}))
    return link(graph, {"base": base})


X = torch.ones(2, 2)


def _two_doubled(module: fx.GraphModule) -> None:
    """Make the graph add its input twice."""
    add = next(node for node in module.graph.nodes if node.op == "call_function")
    with module.graph.inserting_after(add):
        again = module.graph.call_function(torch.add, (add, add.args[0]))
    add.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    module.recompile()


def test_a_run_follows_each_change(module: fx.GraphModule) -> None:
    first = module.forward  # as one who keeps it before it is generated
    weight = module.base.weight
    assert torch.equal(first(X)[0], X + weight)
    assert torch.equal(module(X)[0], X + weight)
    _two_doubled(module)
    assert torch.equal(module(X)[0], X + weight + X)
    assert module.code.count("add") > 1


def test_two_graphs_are_apart(module: fx.GraphModule) -> None:
    other = link(copy.deepcopy(module.graph), {"base": module.base})
    _two_doubled(other)
    assert torch.equal(module(X)[0] + X, other(X)[0])


def test_copies_compute_the_same(module: fx.GraphModule) -> None:
    assert torch.equal(copy.deepcopy(module)(X)[0], module(X)[0])


@pytest.mark.parametrize("module", ["base.weight"], indirect=True)  # fx itself reads a pickle, and no keywords in it
def test_pickles_compute_the_same(module: fx.GraphModule) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(module))(X)[0], module(X)[0])


class _Named(nn.Module):
    """A model with modules, a parameter and a buffer that have the names of Python's keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in": nn.Linear(2, 4), "class": nn.Linear(4, 2)})
        self.register_parameter("is", nn.Parameter(torch.ones(2)))
        self.register_buffer("None", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers["class"](torch.relu(self.layers["in"](x)))
        return y * getattr(self, "is") + getattr(self, "None")  # type: ignore[no-any-return]


def test_pythons_keywords_as_names_in_a_model(tmp_path: Path) -> None:
    """The code that fx itself makes for them ends in a SyntaxError, where a call or an export runs the graph."""
    rule = peftfx.LoRA(r=2, target_modules=["in", "class"], init_lora_weights=False)
    base = _Named().eval()
    by_graph = peftfx.transform(base, rule, inputs={"x": X}, seed=0, road="graph")
    by_modules = peftfx.transform(base, rule, inputs={"x": X}, seed=0)
    torch.testing.assert_close(by_graph(x=X), by_modules(x=X))
    peftfx.export_onnx(base, tmp_path / "out", slots="all-linear", inputs={"x": X})
