"""The contexts that models are captured, traced and looked at in, and left as they were."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn
from torch._guards import detect_fake_mode


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """The context captures and traces run in, whatever the caller's: gradients on, no inference mode, no autocast."""
    kinds = ["cpu", *({p.device.type for p in model.parameters()} - {"cpu", "meta"})]
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    with torch.inference_mode(False), torch.enable_grad(), _quiet():
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        try:
            yield
        finally:
            for kind, enabled in before.items():
                torch.set_autocast_enabled(kind, enabled)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module of `model` is in eval mode; afterwards each is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def fake_mode_of(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """The `FakeTensorMode` that the model was built under, or nothing."""
    return detect_fake_mode(list(model.parameters())) or contextlib.nullcontext()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporters say of their own choices, and of what they raise, out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_TALKATIVE = (
    "torch.export",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch._export.non_strict_utils",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._registration",
)
