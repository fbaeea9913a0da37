"""Runs a program of one example for several examples at once, so that their number can be free.

Each operator is run once, on tensors with one more axis for the examples; what does not depend on the examples stays as
it is. So weights are read, and layers are adapted, at the same operators as in the program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from peftfx.graph.batching.rules import rule_of
from peftfx.graph.batching.several import Several, aten, not_batched, several_of


class _Runner(fx.Interpreter):
    """A run of a program for several examples.

    Args:
        program: the program of one example, all of whose sizes are fixed.
        read: returns what a `get_attr` node reads.
    """

    def __init__(self, program: fx.GraphModule, read: Callable[[str], Any]) -> None:
        super().__init__(program, garbage_collect_values=False)
        self._read = read
        self._node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator. Its code's place goes on to the new operators."""
        self._node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what the program reads, as it is now."""
        return self._read(str(target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, for all examples at once if it depends on them."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_several)
        if target is operator.getitem or not any(map(_is_several, leaves)):
            return target(*args, **kwargs)
        assert self._node is not None
        made = self._node.meta.get("val")
        if not isinstance(target, torch._ops.OpOverload) or not _is_fixed(made):
            raise not_batched(str(target))
        given = _by_name(target, args, kwargs)
        if target._schema.is_mutable:
            self._own_first(target, given)
        result = rule_of(target)(target, given, made)
        return pytree.tree_map_only(Tensor, Several, result)

    def _own_first(self, target: Any, given: dict[str, Any]) -> None:
        """Give each example a copy of a tensor for all that an operator writes into."""
        name, first = next(iter(given.items()))
        if isinstance(first, Several):
            return
        assert self._node is not None
        written = self._node.args[0]
        if not isinstance(written, fx.Node) or len(written.users) > 1 or not _is_new(written):
            raise not_batched(str(target))  # other code may read what is written
        leaves = pytree.tree_leaves(list(given.values()), is_leaf=_is_several)
        count = next(leaf for leaf in leaves if _is_several(leaf)).count
        copies = aten.clone.default(several_of(first, count).value, memory_format=torch.contiguous_format)
        given[name] = Several(copies)


def run_for_several(
    program: fx.GraphModule, inputs: Mapping[str, Tensor], read: Callable[[str], Any]
) -> tuple[Tensor, ...]:
    """Return the outputs of a program for several examples, each with a first axis for the examples.

    Args:
        program: the program of one example. It returns tensors that depend on its inputs.
        inputs: the inputs by the names of its placeholders, each with a first axis for the examples.
        read: returns the tensor that a `get_attr` node reads, by its target.

    Raises:
        PeftfxError: there is no way to run an operator for several examples, or a size depends on values.
    """
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    with preserve_node_meta():
        found = _Runner(program, read).run(*(Several(inputs[name]) for name in names))
    return tuple(value.value for value in found)


def _is_several(value: object) -> bool:
    return isinstance(value, Several)


def _is_new(node: fx.Node) -> bool:
    """Return whether an operator gives a tensor with memory of its own."""
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and all(one.alias_info is None for one in op._schema.returns)


def _is_fixed(made: object) -> bool:
    """Return whether all sizes of a result are known for one example."""
    leaves = pytree.tree_leaves(made)
    return bool(leaves) and all(
        isinstance(leaf, Tensor) and all(isinstance(size, int) for size in leaf.shape) for leaf in leaves
    )


def _by_name(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by name, with the defaults of those that are positional."""
    wanted = op._schema.arguments
    given = dict(zip((a.name for a in wanted), args, strict=False)) | dict(kwargs)
    defaults = {a.name: a.default_value for a in wanted if a.name not in given and a.has_default_value()}
    return {a.name: {**defaults, **given}[a.name] for a in wanted if a.name in given or a.name in defaults}
