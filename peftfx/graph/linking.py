"""Make a GraphModule whose attributes are read from the modules and tensors that other programs read, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn


class _Forward:
    """In place of a forward: it generates the forward when it is looked up, by a call or by `torch.compile`."""

    def __get__(self, module: fx.GraphModule | None, owner: type) -> Any:
        if module is None:
            return self
        fx.GraphModule.recompile(module)  # this replaces the forward
        return module.forward


_PENDING = _Forward()


class _Linked(fx.GraphModule):
    """A GraphModule whose Python code is generated when it is first needed: most are only read and rewritten."""

    def recompile(self) -> None:  # type: ignore[override]
        type(self).forward = _PENDING  # type: ignore[assignment]  # each GraphModule has a class of its own

    @property
    def code(self) -> str:
        if vars(type(self)).get("forward") is _PENDING:
            super().recompile()
        return super().code

    def __reduce__(self) -> Any:
        return fx.GraphModule(self, self.graph).__reduce__()


def link(graph: fx.Graph, holders: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Return a GraphModule over `graph` whose attributes live in `holders`: looked up at run time, not copied."""
    module = _Linked(nn.Module(), fx.Graph())
    for name, holder in holders.items():
        module.add_module(name, holder)
    module.graph = graph
    return module
