"""Lengths of tensors: `len(x)` in a model's code, and `torch_int` of a size, stay free during a capture.

Python's own `len` gives a plain number, which fixes the axis at the example's size. Inside the context the files of the
model's code have a `len` that gives `x.shape[0]` of a tensor. transformers' `torch_int` gives a plain number unless
torch.jit traces. Here it gives a size as it is.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import SymInt, Tensor, nn
from transformers.utils.generic import torch_int

from peftfx.graph.capturing.sizes.free_sizes import repeated_lists


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else builtins.len(value)


def _whole(value: Any) -> Any:
    return value if isinstance(value, SymInt) else torch_int(value)


@contextmanager
def free_lengths(model: nn.Module) -> Iterator[None]:
    """Let the first axis of a tensor stay free where the code of the model's modules asks for its `len`.

    So does a size by which a list is multiplied (`repeated_lists`), and one that is made a whole number.
    """
    files = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    own = [vars(sys.modules[name]) for name in files if name in sys.modules and name.partition(".")[0] != "torch"]
    lengths = [names for names in own if "len" not in names and names is not vars(builtins)]
    whole = [(names, name) for names in own for name, value in names.items() if value is torch_int]
    for names in lengths:
        names["len"] = _length
    for names, name in whole:
        names[name] = _whole
    try:
        with repeated_lists():
            yield
    finally:
        for names in lengths:
            names.pop("len", None)
        for names, name in whole:
            names[name] = torch_int
