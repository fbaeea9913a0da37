"""Make a GraphModule whose attributes are read from the modules and tensors that other programs read, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn


class _Linked(fx.GraphModule):
    """A GraphModule whose Python code is generated when it is first needed: most are only read and rewritten."""

    def recompile(self) -> None:  # type: ignore[override]
        type(self).forward = _Linked._generated  # each GraphModule has a class of its own

    def _generated(self, *tensors: torch.Tensor) -> object:
        if type(self).forward is _Linked._generated:
            super().recompile()  # this replaces the forward
        return self.forward(*tensors)

    @property
    def code(self) -> str:
        if type(self).forward is _Linked._generated:
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
