"""Collect the translations of torch's operators once in a process, and read only those that a model needs.

torch's exporter builds its registry again for each export, and onnxscript parses the source of all 500 functions each
time. This takes half of the time of a small model's translation. torch also lists all composite operators each time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from onnxscript import TracedOnnxFunction
from torch.export import decomp_utils
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._registration import OnnxDecompMeta, ONNXRegistry

_collect = ONNXRegistry.from_torchlib
_list_composites = decomp_utils._collect_all_valid_cia_ops  # type: ignore[attr-defined]


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


@functools.lru_cache(maxsize=1)
def _composites(_: int) -> frozenset[object]:
    return frozenset(_list_composites())


def _known_composites() -> frozenset[object]:
    """Return torch's list of composite operators, made again only when operators were registered since."""
    return _composites(len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")))


@contextmanager
def collected_once() -> Iterator[None]:
    """Make torch's exporter start from what is collected, of the registry from a copy, while this context lasts."""
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign, assignment]
    decomp_utils._collect_all_valid_cia_ops = _known_composites  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        decomp_utils._collect_all_valid_cia_ops = _list_composites  # type: ignore[attr-defined]
        ONNXRegistry.from_torchlib = _collect  # type: ignore[method-assign]
