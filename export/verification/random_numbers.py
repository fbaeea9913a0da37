"""Graphs that draw random numbers are refused: no verification tells a wrong result from another draw."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.analysis.dataflow import arguments_of
from peftfx.analysis.weight_ops import module_path
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph

#: Arguments that turn an operator's draws off, with the values that do.
_OFF = {"train": False, "training": False, "dropout_p": 0.0, "dropout": 0.0, "p": 0.0}


def refuse_random(graph: Graph) -> None:
    """Refuse a graph whose outputs depend on random numbers.

    Raises:
        PeftfxError: the model draws numbers in eval mode, such as by a dropout that is always on.
    """
    draws = [node for node in graph.nodes() if _draws(node)]
    live: set[fx.Node] = set()
    for node in reversed(list(graph.nodes())) if draws else ():
        if node.op == "output" or live & _readers(node):
            live.add(node)
    drawn = [node for node in draws if node in live]
    if drawn:
        where = module_path(drawn[0]) or type(graph.base).__name__
        what = f"the model draws random numbers in eval mode ({drawn[0].target}): two runs of it differ"
        hint = "turn this off in the model's config or code, or draw the numbers outside and pass them as an input"
        raise PeftfxError(what, where, hint)


def _readers(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that read a node's result: of a write in place, all that read the written tensor, too."""
    found, written = set(node.users), node
    while _shares_memory(written) and isinstance(first := written.args[0], fx.Node):
        found |= set(first.users)
        written = first
    return found - {node}


def _shares_memory(node: fx.Node) -> bool:
    """Return whether an operator writes into its first argument, or gives a view of it."""
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and bool(node.args) and (op._schema.is_mutable or op.is_view)


def _draws(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    given = arguments_of(node)
    return not any(name in given and given[name] == off for name, off in _OFF.items())
