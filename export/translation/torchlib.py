"""Collect the translations of torch's operators once in a process, instead of once for each model.

torch's exporter builds its registry again for each export, and onnxscript parses the source of all 500 functions each
time. This takes half of the time of a small model's translation.
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
    """Return a copy of the registry, to which the exporter may add translations."""
    made = copy.copy(_collected(opset_version))
    made.functions = {target: list(found) for target, found in made.functions.items()}
    return made


@contextmanager
def collected_once() -> Iterator[None]:
    """Make torch's exporter start from a copy of the collected registry while this context lasts."""
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = _collect  # type: ignore[method-assign]
