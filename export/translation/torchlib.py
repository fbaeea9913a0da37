"""collected_once: what translates torch's operators is collected once in a process, and not for each model.

torch's exporter makes its registry anew each time, for which onnxscript parses the source of each of its 500 functions
again: half of the time that the translation of a small model takes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch.onnx._internal.exporter._registration import ONNXRegistry

_collect = ONNXRegistry.from_torchlib


@functools.cache
def _collected(opset: int) -> ONNXRegistry:
    return _collect(opset_version=opset)


def _copied(opset_version: int) -> ONNXRegistry:
    """A registry that the exporter may add translations to."""
    made = copy.copy(_collected(opset_version))
    made.functions = {target: list(found) for target, found in made.functions.items()}
    return made


@contextmanager
def collected_once() -> Iterator[None]:
    """Inside, torch's exporter starts from a copy of what was collected."""
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = _collect  # type: ignore[method-assign]
