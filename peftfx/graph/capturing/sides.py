"""Sides: during a capture, the side of each branch of the model's code on a boolean of the call's inputs or of buffers.

Code such as `if mask.any(): x = x.masked_fill(mask, 0)` asks for a value that a capture does not have. The boolean is
computed from the call's inputs alone, so the nodes that compute it become a program of their own. The program tells for
each call which side the code takes. A boolean that is computed from the model's buffers alone has the side of their
values. One that is computed from weights, or from buffers and inputs, is not decided, and neither is a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.graph.decisions import Decision, has_values
from peftfx.graph.linking import link
from peftfx.graph.rewriter import Rewriter
from peftfx.graph.written import memory_of, written_by

_aten = torch.ops.aten
#: Operators that give the boolean of their argument in another form.
_SAME = {
    _aten.item.default,
    _aten._local_scalar_dense.default,
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.clone.default,
    _aten.to.dtype,
    _aten.to.device,
}
_ANY = {_aten.any.default, _aten.any.dim, _aten.any.dims}
_ALL = {_aten.all.default, _aten.all.dim, _aten.all.dims}


@dataclass
class Sides:
    """Decides in a capture, and keeps the decisions.

    Attributes:
        tensors: the example's inputs, by name, in the order of the capture's last placeholders.
        general: whether to take the side of a call in which elements differ, `any` true and `all` false: what the code
            does there often changes nothing in other calls. Otherwise the side that the example takes.
        held: the model's own parameters and buffers, in the order of the placeholders ahead of those. Only buffers are
            read: a parameter may be trained.
        made: the decisions.
        turned: whether some decision is not the example's.
    """

    tensors: Mapping[str, Tensor]
    general: bool
    held: Sequence[Tensor] = ()
    made: list[Decision] = field(default_factory=list)
    turned: bool = False
    _answers: dict[sympy.Basic, bool] = field(default_factory=dict)

    def begin(self) -> None:
        """Begin another capture of the same call."""
        self.made, self._answers = [], {}

    def decide(self, expr: sympy.Basic, where: str, text: str) -> sympy.Basic | None:
        """Return the value of an expression with a boolean that was read from a tensor, or None if it has no side.

        Args:
            expr: the expression.
            where: the line of the code that asks.
            text: what the line says, quoted, in brackets.
        """
        symbols = list(expr.free_symbols)
        if len(symbols) != 1:
            return None
        (symbol,) = symbols
        if symbol not in self._answers:
            mode = proxy_tensor.get_proxy_mode()
            node = None if mode is None else _read(mode.tracer.graph, symbol)
            decision = None if mode is None or node is None else self._decision(mode.tracer, node, where, text)
            if decision is None:
                return None
            if decision.inputs or decision.buffers:  # what is computed from constants is the same in every call
                self.made.append(decision)
            self._answers[symbol] = decision.answer
        value = expr.xreplace({symbol: sympy.Integer(int(self._answers[symbol]))})
        return value if value in (sympy.true, sympy.false) else None

    def _decision(self, tracer: Any, node: fx.Node, where: str, text: str) -> Decision | None:
        places = list(node.graph.find_nodes(op="placeholder"))
        read = dict(zip(places[len(places) - len(self.tensors) :], self.tensors.values(), strict=True))
        names = dict(zip(read, self.tensors, strict=True))
        if len(places) == len(self.held) + len(read):
            read |= {n: t for n, t in zip(places, self.held) if not isinstance(t, nn.Parameter)}
        tensor = node.args[0]
        assert isinstance(tensor, fx.Node)
        body = _needed(tensor, set(read))
        if body is None or tensor.meta["val"].dtype != torch.bool:
            return None
        constants = [node for node in body if node.op == "get_attr"]
        made = {node: getattr(tracer.root, str(node.target), None) for node in constants}
        numbers = {node: value for node, value in made.items() if isinstance(value, Tensor) and not value.ndim}
        if len(numbers) < len(constants):
            return None
        inputs = [place for place in places if any(place in other.all_input_nodes for other in body)]
        if not all(has_values(read[place]) for place in inputs) or len({place in names for place in inputs}) > 1:
            return None
        buffers = tuple(read[place] for place in inputs if place not in names)
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # this is no part of the capture
            program = _program(inputs, body, tensor, {n: number.item() for n, number in numbers.items()})
            asked = Decision(program, tuple(names[p] for p in inputs if p in names), False, where, text, "", buffers)
            own = asked.of(self.tensors)
        side = _general(tensor) if self.general and not buffers else None
        answer = own if side is None else side
        self.turned |= answer != own
        return dataclasses.replace(asked, answer=answer)


def _read(graph: fx.Graph, symbol: sympy.Basic) -> fx.Node | None:
    """Return the node that read a boolean from a tensor, by the boolean's symbol."""
    for node in reversed(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymBool) and value.node.expr.free_symbols == {symbol}:
            return node if node.target in _SAME else None
    return None


def _program(
    inputs: list[fx.Node], body: list[fx.Node], result: fx.Node, numbers: dict[fx.Node, object]
) -> fx.GraphModule:
    """Return the program of these nodes, in which numbers that the code has made tensors of are made anew."""
    rewriter = Rewriter(fx.Graph())
    last, copies = None, dict[fx.Node, fx.Node]()
    for node in inputs:
        last = copies[node] = rewriter.placeholder(node.name, node.meta["val"], last)
    for node in body:
        if node in numbers:
            value = node.meta["val"]
            copies[node] = rewriter.end().call(_aten.full.default, [], numbers[node], dtype=value.dtype, value=value)
        else:
            copies[node] = rewriter.end().copy(node, copies)
    rewriter.graph.output(copies[result])
    return link(rewriter.graph, {})


def _needed(tensor: fx.Node, inputs: set[fx.Node]) -> list[fx.Node] | None:
    """Return the nodes that compute a tensor from the inputs, in order; None if it depends on anything else.

    A node that writes in place into a tensor that is needed is needed too.
    """
    found: set[fx.Node] = set()
    writes = [(node, stored) for node in tensor.graph.nodes for stored in _changed(node)]
    held = {stored for place in inputs for stored in memory_of(place)}
    todo = [tensor]
    while todo:
        node = todo.pop()
        if node in found or node in inputs:
            continue
        if node.op not in ("call_function", "get_attr") or _is_random(node):
            return None
        found.add(node)
        todo += node.all_input_nodes
        own = memory_of(node)
        todo += [write for write, stored in writes if stored in own]
    if any(stored in held for node in found for stored in _changed(node)):
        return None  # it writes into an input, which is no longer the call's
    return [node for node in tensor.graph.nodes if node in found]


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _changed(node: fx.Node) -> set[int]:
    """Return the memory that a node writes into."""
    return {stored for argument in written_by(node) for stored in memory_of(argument)}


def _general(node: fx.Node) -> bool | None:
    """Return the value of a boolean in a call in which elements differ, or None if that is not known."""
    while True:
        source = node.args[0] if node.args else None
        if node.target in _ANY:
            return True
        if node.target in _ALL:
            return False
        if node.target is _aten.logical_not.default and isinstance(source, fx.Node):
            other = _general(source)
            return None if other is None else not other
        is_same = node.target in _SAME or (node.target is _aten.ne.Scalar and node.args[1] == 0)
        if not is_same or not isinstance(source, fx.Node):
            return None
        node = source
