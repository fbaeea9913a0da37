"""Steps of a model's code whose backward is the code's own: classes of `torch.autograd.Function`.

A capture has what such a step computes forward, and torch differentiates that. A straight-through rounding then has the
gradient zero, and a class that limits its gradients no limit. So the graph remembers these classes, and a call that
needs gradients tells of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

_OF_LIBRARIES = ("torch", "peftfx")


@contextmanager
def own_backwards() -> Iterator[list[str]]:
    """Yield a list that has in the end the names of the classes inside whose backward the capture leaves out.

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
        return apply.__func__(cls, *args, **kwargs)

    Function.apply = classmethod(noting)  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        Function.apply = apply  # type: ignore[method-assign]
