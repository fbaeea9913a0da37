"""The laws of what an insertion must not change: the rest of the program, the base's tensors, and other gradients."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.bases.guests import own_parameters
from peftfx.contract.method import Method
from peftfx.graph.graph import ADAPTERS, Graph
from peftfx.graph.rewriter import OVERRIDES, REGION, REPLACES
from peftfx.testing.cases import Case
from peftfx.testing.pool import captured
from peftfx.testing.setup import adapt, assert_untouched, output, snapshot


def frame(case: Case, method: Method) -> None:
    """Nothing outside the inserted region changes, in eval and in train mode."""
    for training in (False, True):
        adapted = adapt(case, method, training=training)
        assert _kept(adapted.graph()) == _kept(adapted.graph(adapted=False))


def gradients(case: Case, method: Method) -> None:
    """A training step changes each trained tensor of the adapter, and no other bit of the model."""
    adapted = adapt(case, method, training=True)
    adapter, before = adapted.adapter("default"), snapshot(captured(case.spec).model)
    constants = {name: t.clone() for name, t in adapter.named_buffers()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(case.seed)
    given = output(adapted, case.inputs())
    assert given.requires_grad, "the output depends on nothing that is trained"
    given.float().square().sum().backward()
    optimizer.step()
    adapted(**case.inputs())
    assert [n for n, p in own_parameters(adapted.base) if p.grad is not None] == []
    assert [n for n, p in adapter.named_parameters() if p.grad is None] == []
    assert all(torch.equal(t, constants[name]) for name, t in adapter.named_buffers())
    assert_untouched(adapted.base, before)


def _kept(graph: Graph) -> list[str]:
    """Return a program's lines without what adapters added; written independently of `Remove`, to check that pass."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    overridden: dict[fx.Node, str] = {}
    by_name = {node.name: node for node in graph.nodes()}
    attributes = {str(node.target): node for node in graph.nodes() if node.op == "get_attr"}

    def original(node: fx.Node) -> str:
        while REPLACES in node.meta:
            node = by_name[node.meta[REPLACES]]
        return overridden.get(node) or names[node]

    for node in graph.nodes():
        if OVERRIDES in node.meta:
            overridden[node] = names[attributes[node.meta[OVERRIDES]]]
        elif REGION not in node.meta and not (node.op == "get_attr" and str(node.target).startswith(f"{ADAPTERS}.")):
            names[node] = f"%{len(names)}"
            args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: Name(original(n)))
            lines.append(f"{names[node]} = {node.op} {node.target if node.op != 'output' else ''} {args}")
    return lines


class Name(str):
    """A value's name inside arguments."""
