"""Declared sizes: whether the tensors inside a captured graph have the sizes that its capture found, in some call."""

from __future__ import annotations

import torch
from torch import Tensor, fx


def has_declared_sizes(module: fx.GraphModule, *inputs: Tensor) -> bool:
    """Run a graph, and say whether all its tensors have the sizes that it declares.

    A size that is declared as a number is that number, and sizes that are declared by one expression are equal.

    Args:
        module: the graph, with a fake tensor in `meta["val"]` of each node that has a declared shape.
        inputs: the inputs of the call, in order.
    """
    run = _Sizes(module)
    run.run(*inputs)
    return run.agree


class _Sizes(fx.Interpreter):
    """Runs a graph and compares sizes on the way."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.agree = True
        self._sizes: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> object:
        value, declared = super().run_node(n), n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(declared, Tensor):
            self.agree &= value.ndim == declared.ndim and all(map(self._agrees, declared.shape, value.shape))
        return value

    def _agrees(self, declared: int | torch.SymInt, size: int) -> bool:
        if isinstance(declared, int):
            return declared == size
        return self._sizes.setdefault(str(declared.node.expr), size) == size
