"""A graph's code is generated when the graph is first run or printed, and it can be copied and pickled before that."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from peftfx.graph.linking import link


@pytest.fixture
def module() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("base.weight")
    graph.output((graph.call_function(torch.add, (x, weight)),))
    return link(graph, {"base": nn.Linear(2, 2, bias=False)})


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same(module: fx.GraphModule, copied: object) -> None:
    assert torch.equal(copied(module)(X)[0], module(X)[0])  # type: ignore[operator]
