"""Casts of modules by a model's own code, which torch.export does not trace: its tensors have no data to replace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Change = Callable[[Tensor], Tensor]


@contextmanager
def casting_in_graph() -> Iterator[None]:
    """Inside the context, `module.to(dtype)` and its like cast a module's tensors as operators of the graph do.

    A router may cast its own layer in each forward. A cast to the dtype and the device that a tensor has leaves no
    operator. The module keeps the results: whoever opens the context restores the module's attributes after it.
    """
    thread, original = threading.get_ident(), nn.Module._apply

    def apply(self: nn.Module, change: Change, recurse: bool = True) -> nn.Module:
        if threading.get_ident() != thread:
            return original(self, change, recurse)
        for module in self.modules() if recurse else (self,):
            _cast(module._parameters, change)
            _cast(module._buffers, change)
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def _cast(tensors: MutableMapping[str, Any], change: Change) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and _changes(change, tensor):
            tensors[name] = change(tensor)


def _changes(change: Change, tensor: Tensor) -> bool:
    """Return whether the dtype or the device would be another, by a trial that leaves no operator in the graph."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        tried = change(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
    return (tried.dtype, tried.device) != (tensor.dtype, tensor.device)
