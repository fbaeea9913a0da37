"""Steps of a model's code whose backward is the code's own: classes of `torch.autograd.Function`, and hooks.

A capture has what such a step computes forward, and torch differentiates that. A straight-through rounding then has the
gradient zero, and a class or a hook that limits gradients no limit. So the graph remembers these steps, and a call that
needs gradients tells of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

_OF_LIBRARIES = ("torch", "peftfx")


@contextmanager
def own_backwards(model: nn.Module) -> Iterator[list[str]]:
    """Run a model's code as in training, and yield a list of the steps whose backward the capture leaves out.

    A reentrant checkpoint is such a class too, but is left out: it runs as a plain call, which has the same gradients.
    Otherwise the capture would have its layers without gradients.
    """
    found: list[str] = []
    apply, thread = Function.__dict__["apply"], threading.get_ident()

    def noting(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        here = threading.get_ident() == thread
        if here and issubclass(cls, CheckpointFunction):
            run, _, *values = args
            return run(*values)
        if here and cls.__module__.partition(".")[0] not in _OF_LIBRARIES and cls.__name__ not in found:
            found.append(cls.__name__)
        return apply.__get__(None, cls)(*args, **kwargs)  # a class method of Python's, or, from torch 2.15 on, of C's

    Function.apply = classmethod(noting)  # type: ignore[assignment, method-assign]
    try:
        with _hooks_on_tensors(found), _hooks_on_modules(model, found), _inference_as_no_grad(), _trained(model):
            yield found
    finally:
        Function.apply = apply  # type: ignore[method-assign]


@contextmanager
def _hooks_on_tensors(found: list[str]) -> Iterator[None]:
    """Note that the code sets hooks on tensors, and set none: a capture's own tensors have no backward."""
    hook, retain, thread = Tensor.register_hook, Tensor.retain_grad, threading.get_ident()

    def hooked(self: Tensor, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        if threading.get_ident() != thread:
            return hook(self, function)
        if _HOOK not in found:
            found.append(_HOOK)
        return RemovableHandle(OrderedDict())

    def retained(self: Tensor) -> None:
        if threading.get_ident() != thread:
            retain(self)

    Tensor.register_hook, Tensor.retain_grad = hooked, retained  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.register_hook, Tensor.retain_grad = hook, retain  # type: ignore[method-assign]


_HOOK = "Tensor.register_hook"


@contextmanager
def _hooks_on_modules(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note which modules have hooks on gradients, and run the modules without them.

    Such hooks would add nodes to the modules' own, which then could host no adapter.
    """
    held = []
    for path, module in model.named_modules():
        for hooks in (module._backward_pre_hooks, module._backward_hooks):
            if hooks:
                held.append((hooks, dict(hooks)))
                found.append(f"a backward hook of {path or 'the model'}")
                hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


@contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    """Let the values of a model in training need gradients, as they do behind an adapter.

    Code sets hooks only where `x.requires_grad`, which the values of a frozen base alone would not.
    """
    own = model.parameters() if model.training else ()
    frozen = [p for p in own if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    for parameter in frozen:
        parameter.requires_grad = True
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


@contextmanager
def _inference_as_no_grad() -> Iterator[None]:
    """Run code under `torch.inference_mode` as code under `torch.no_grad`: of the two, a capture sees only that.

    Otherwise the graph would give gradients to the layers that such code runs.
    """
    mode, thread = torch.inference_mode, threading.get_ident()
    enter = mode.__enter__  # `__exit__` leaves what this has entered

    def entered(self: Any) -> None:
        if not self.mode or threading.get_ident() != thread:
            return enter(self)
        self._inference_mode_context = torch.no_grad()
        return self._inference_mode_context.__enter__()

    mode.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield
    finally:
        mode.__enter__ = enter  # type: ignore[method-assign]
