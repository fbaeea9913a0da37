"""Lengths of tensors: `len(x)` in a model's code stays free during a capture.

Python's own `len` gives a plain number, which fixes the axis at the example's size. Inside the context the files of the
model's code have a `len` that gives `x.shape[0]` of a tensor.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peftfx.graph.capturing.sizes.free_sizes import repeated_lists

_NAME = "len"


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else builtins.len(value)


@contextmanager
def free_lengths(model: nn.Module) -> Iterator[None]:
    """Let the first axis of a tensor stay free where the code of the model's modules asks for its `len`.

    So does a size by which a list is multiplied (`repeated_lists`).
    """
    files = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    own = [vars(sys.modules[name]) for name in files if name in sys.modules and name.partition(".")[0] != "torch"]
    changed = [names for names in own if _NAME not in names and names is not vars(builtins)]
    for names in changed:
        names[_NAME] = _length
    try:
        with repeated_lists():
            yield
    finally:
        for names in changed:
            names.pop(_NAME, None)
