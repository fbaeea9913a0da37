"""Collect the translations of torch's operators once in a process, and read only those that a model needs.

torch's exporter builds its registry again for each export, and onnxscript parses the source of all 500 functions each
time. This takes half of the time of a small model's translation.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from onnxscript import TracedOnnxFunction
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._registration import OnnxDecompMeta, ONNXRegistry

_collect = ONNXRegistry.from_torchlib


class _Unread(OnnxDecompMeta):
    """A translation whose function is parsed when its signature is first asked for."""

    def __post_init__(self) -> None:
        if self.signature is None and not self.skip_signature_inference:
            del self.signature

    def __getattr__(self, name: str) -> object:
        if name != "signature":
            raise AttributeError(name)
        self.signature = None
        super().__post_init__()
        return self.signature


def _collect_unread(opset_version: int) -> ONNXRegistry:
    """Collect all translations. onnxscript parses some for their domain alone, which their operator set has too."""
    parsed = TracedOnnxFunction.function_ir
    _registration.OnnxDecompMeta = _Unread  # type: ignore[misc]
    TracedOnnxFunction.function_ir = property(lambda function: function.opset)  # type: ignore[assignment]
    try:
        return _collect(opset_version=opset_version)
    finally:
        TracedOnnxFunction.function_ir = parsed  # type: ignore[method-assign]
        _registration.OnnxDecompMeta = OnnxDecompMeta  # type: ignore[misc]


@functools.cache
def _collected(opset: int) -> ONNXRegistry:
    return _collect_unread(opset)


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
