"""Contexts in which models are captured, traced and inspected, and after which they are unchanged."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftfx.graph.capturing.trace_lock import TRACING

_DESCRIBE = "_extract_tensor_metadata"  #: the function by which torch describes a node's value a second time
_FIND_FREE = "_free_unbacked_symbols_with_path"  #: the function by which torch looks for sizes that values decide


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Run captures and traces with gradients on, and without inference mode or autocast, whatever the caller has set.

    Only one thread can be in this context: torch patches modules for all threads while it traces.
    """
    with TRACING, torch.inference_mode(False), torch.enable_grad(), quietly(), without_autocast(model):
        yield


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Compute in the dtypes of the model's own code, whatever autocast the caller has set."""
    kinds = ["cpu", *({p.device.type for p in model.parameters()} - {"cpu", "meta"})]
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind, enabled in before.items():
            torch.set_autocast_enabled(kind, enabled)


@contextlib.contextmanager
def sparing(model: nn.Module) -> Iterator[None]:
    """Make torch record only nodes in a capture: no stack traces, and no source of a module until it is run.

    Nothing reads these, and they take a third of a capture's time. Python's garbage collection is off too, as it would
    visit all nodes again and again. torch's cache of fake tensors is off: with symbolic sizes a look-up costs more than
    the computation. A node's metadata is its value alone: torch also asks for the value's memory format each time, and
    answers about symbolic sizes take long. Sizes that values decide are looked for only if there are any. Code
    that runs the program of torch.export must not use this context, because the program's guards are made from such
    source.
    """
    traces, recompile, collects = fx_config.do_not_emit_stack_traces, fx.GraphModule.recompile, gc.isenabled()
    own = detect_fake_mode(list(model.parameters()))
    caches = dynamo_config.fake_tensor_cache_enabled, own is not None and own.cache_enabled
    described, found = vars(proxy_tensor)[_DESCRIBE], vars(symbolic_shapes)[_FIND_FREE]

    def later(module: fx.GraphModule) -> None:
        def forward(self: fx.GraphModule, *args: object, **kwargs: object) -> object:
            recompile(self)  # this replaces the forward
            return self.forward(*args, **kwargs)

        if isinstance(codegen := module._graph._codegen, fx.graph._PyTreeCodeGen):
            module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        type(module).forward = forward

    def find(*args: object, pending: set[object] | None = None, **kwargs: object) -> object:
        return found(*args, pending=pending, **kwargs) if pending else {}

    fx_config.do_not_emit_stack_traces, fx.GraphModule.recompile = True, later  # type: ignore[method-assign, assignment]
    dynamo_config.fake_tensor_cache_enabled = False  # for the modes that torch makes
    setattr(proxy_tensor, _DESCRIBE, lambda *_: None)
    setattr(symbolic_shapes, _FIND_FREE, find)
    if own is not None:
        own.cache_enabled = False
    gc.disable()
    try:
        yield
    finally:
        dynamo_config.fake_tensor_cache_enabled = caches[0]
        setattr(proxy_tensor, _DESCRIBE, described)
        setattr(symbolic_shapes, _FIND_FREE, found)
        if own is not None:
            own.cache_enabled = caches[1]
        fx_config.do_not_emit_stack_traces, fx.GraphModule.recompile = traces, recompile  # type: ignore[method-assign]
        if collects:
            gc.enable()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore all attributes of the model after the context, whatever its code sets inside.

    Otherwise code that keeps a tensor for the next call would keep a fake tensor after a capture. Restored are the
    attributes of every module and parameter and of the plain objects in them, the contents of their lists, dicts and
    sets, and the memory of parameters whose `data` the code replaces, as bitsandbytes does where it repacks a layer.
    Its 8-bit layers, in their first call, move codes and scales from attributes of the parameter into the module.
    """
    before: dict[int, tuple[object, object]] = {}
    for module in model.modules():
        _remember(vars(module), before, _DEPTH)
    for parameter in model.parameters():
        _remember(vars(parameter), before, _DEPTH)
    held = [(p, data) for p in model.parameters() if _has_memory(data := p.data)]
    try:
        yield
    finally:
        for container, contents in before.values():
            _restore(container, contents)
        for parameter, data in held:
            if _place(parameter.data) != _place(data):
                parameter.data = data


def _has_memory(data: torch.Tensor) -> bool:
    """Return whether a tensor is torch's own, and has one memory: a sparse one has several, a part of a whole none."""
    return type(data) is torch.Tensor and data.layout is torch.strided


def _place(data: torch.Tensor) -> tuple[object, ...]:
    """Return what tells a tensor's memory, and its place there."""
    return data.untyped_storage()._cdata, data.storage_offset(), data.shape


_DEPTH = 4  #: how deep into an attribute's value
_PLAIN = frozenset({bool, int, float, str, bytes, type(None), nn.Parameter})  #: types of most attributes


def _remember(value: object, before: dict[int, tuple[object, object]], depth: int) -> None:
    """Record the contents of a container, and of the containers in it."""
    if type(value) in _PLAIN or isinstance(value, (nn.Module, torch.Tensor, type, ModuleType)):
        return
    if id(value) in before or not depth:
        return
    if isinstance(value, (dict, list, set)):
        before[id(value)] = value, _copied(value)
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item, before, depth - 1)
    elif isinstance(value, tuple):
        for item in value:
            _remember(item, before, depth - 1)
    elif isinstance(own := getattr(value, "__dict__", None), dict) and not callable(value):
        _remember(own, before, depth - 1)


def _copied(container: dict[object, object] | list[object] | set[object]) -> object:
    """Return a copy that is no subclass: DeepSpeed's dicts of parameters have no `copy`, and gather what is read."""
    if isinstance(container, dict):
        return dict(container.items())
    return set(container) if isinstance(container, set) else list(container)


def _restore(container: object, contents: object) -> None:
    if isinstance(container, list) and isinstance(contents, list):
        if len(container) != len(contents) or any(a is not b for a, b in zip(container, contents)):
            container[:] = contents
    elif isinstance(container, set) and isinstance(contents, set):
        if container != contents:
            container.clear()
            container.update(contents)
    elif isinstance(container, dict) and isinstance(contents, dict):
        pairs = zip(container.items(), contents.items())
        if len(container) != len(contents) or any(k is not key or v is not value for (k, v), (key, value) in pairs):
            container.clear()
            container.update(contents)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into eval mode inside the context, in which no other thread runs an adapted model."""
    with TRACING:
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
    """Turn transformers' gradient checkpointing off inside the context: graphs are checkpointed by pieces."""
    found = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in found:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in found:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def fake_mode_of(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Return the `FakeTensorMode` that the model was built under, or a null context."""
    return detect_fake_mode(list(model.parameters())) or contextlib.nullcontext()


def fake_mode_to_run(model: nn.Module) -> FakeTensorMode:
    """Return the mode that the model was built under, or a new one.

    In a new one, code may ask for the number in a tensor, and gets one that is not known.
    """
    found = fake_mode_of(model)
    new = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    return found if isinstance(found, FakeTensorMode) else new


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress the messages of torch's exporters about their choices and about errors that they raise."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")  # and restored
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
    "onnx_ir._convenience",
)
