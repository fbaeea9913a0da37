"""The contexts that models are captured, traced and looked at in, and left as they were."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._guards import detect_fake_mode
from torch.fx import config as fx_config

TRACING = threading.RLock()  #: held by the thread that captures or traces


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """The context captures and traces run in, whatever the caller's: gradients on, no inference mode, no autocast.

    One thread at a time is in it: torch patches modules for all threads while it traces.
    """
    kinds = ["cpu", *({p.device.type for p in model.parameters()} - {"cpu", "meta"})]
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    with TRACING, torch.inference_mode(False), torch.enable_grad(), _quiet():
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        try:
            yield
        finally:
            for kind, enabled in before.items():
                torch.set_autocast_enabled(kind, enabled)


@contextlib.contextmanager
def sparing(model: nn.Module) -> Iterator[None]:
    """Inside, torch makes of a capture its nodes alone: no stack traces, and no source of a module until it is run.

    Nobody reads these, and they are a third of a capture. Python does not look for garbage either: it would go through
    all nodes again and again. Fake tensors are not looked up in torch's cache of earlier calls: with sizes that are
    symbols, to look one up and to make it from what is found costs more than to compute it.
    Not for what runs the program of torch.export: its guards are made of such source.
    """
    traces, recompile, collects = fx_config.do_not_emit_stack_traces, fx.GraphModule.recompile, gc.isenabled()
    own = detect_fake_mode(list(model.parameters()))
    caches = dynamo_config.fake_tensor_cache_enabled, own is not None and own.cache_enabled

    def later(module: fx.GraphModule) -> None:
        def forward(self: fx.GraphModule, *args: object, **kwargs: object) -> object:
            recompile(self)  # which puts another forward in the place of this one
            return self.forward(*args, **kwargs)

        if isinstance(codegen := module._graph._codegen, fx.graph._PyTreeCodeGen):
            module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        type(module).forward = forward

    fx_config.do_not_emit_stack_traces, fx.GraphModule.recompile = True, later  # type: ignore[method-assign, assignment]
    dynamo_config.fake_tensor_cache_enabled = False  # of the modes that torch makes
    if own is not None:
        own.cache_enabled = False
    gc.disable()
    try:
        yield
    finally:
        dynamo_config.fake_tensor_cache_enabled = caches[0]
        if own is not None:
            own.cache_enabled = caches[1]
        fx_config.do_not_emit_stack_traces, fx.GraphModule.recompile = traces, recompile  # type: ignore[method-assign]
        if collects:
            gc.enable()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model's code may set what attributes it likes; afterwards each is as it was.

    Code that keeps a tensor for the next call would keep a fake one from a capture. It goes for the attributes of every
    module, of the plain objects that they hold, and for what is in their lists, dicts and sets.
    """
    before: dict[int, tuple[object, object]] = {}
    for module in model.modules():
        _remember(vars(module), before, _DEPTH)
    try:
        yield
    finally:
        for container, contents in before.values():
            _restore(container, contents)


_DEPTH = 4  #: how far into what an attribute holds


def _remember(value: object, before: dict[int, tuple[object, object]], depth: int) -> None:
    """Keep what is in a container, and in those within it."""
    if isinstance(value, (nn.Module, torch.Tensor, type, ModuleType)) or id(value) in before or not depth:
        return
    if isinstance(value, (dict, list, set)):
        before[id(value)] = value, value.copy()
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item, before, depth - 1)
    elif isinstance(value, tuple):
        for item in value:
            _remember(item, before, depth - 1)
    elif isinstance(own := getattr(value, "__dict__", None), dict) and not callable(value):
        _remember(own, before, depth - 1)


def _restore(container: object, contents: object) -> None:
    if isinstance(container, list) and isinstance(contents, list):
        if len(container) != len(contents) or any(a is not b for a, b in zip(container, contents)):
            container[:] = contents
    elif isinstance(container, set) and isinstance(contents, set):
        if container != contents:
            container.clear()
            container.update(contents)
    elif isinstance(container, dict) and isinstance(contents, dict):
        same = list(container) == list(contents)
        if not same or any(container[key] is not value for key, value in contents.items()):
            container.clear()
            container.update(contents)


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


@contextlib.contextmanager
def keeping_activations(model: nn.Module) -> Iterator[None]:
    """Inside, no layer of a transformers model is checkpointed: a graph is checkpointed by pieces, not in its code."""
    found = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in found:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in found:
            module.gradient_checkpointing = True  # type: ignore[assignment]


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")  # and put back
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
