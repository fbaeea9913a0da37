"""The state that a model's own code keeps from one call to the next: buffers and plain attributes.

A graph has no such state: it always computes from the state at its capture. So the reference of an export also starts
each call from that state. A model whose next call gives another result is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError
from peftfx.graph.contexts import unchanged
from peftfx.graph.graph import Graph

_COPIED = 1 << 20  #: the most elements of a buffer that is copied, so that it can be restored
_PLAIN = (int, float, str, type(None))
_T = TypeVar("_T")


class StateError(PeftfxError):
    """Raised when a model's next call gives another result, because of state that it has kept."""


@dataclass(frozen=True)
class _Buffer:
    """A buffer at the time of recording, with a copy of its values unless it is large.

    Where torch computes in float64, the copy is in float64. So the buffer's own dtype is kept beside it.
    """

    path: str
    module: nn.Module
    name: str
    value: Tensor | None
    dtype: torch.dtype | None
    copy: Tensor | None

    @classmethod
    def of(cls, path: str, module: nn.Module, name: str) -> _Buffer:
        value = module._buffers[name]
        small = value is not None and value.numel() <= _COPIED
        dtype = None if value is None else value.dtype
        copy = value.detach().clone() if small else None  # type: ignore[union-attr]
        return cls(f"{path}.{name}".lstrip("."), module, name, value, dtype, copy)

    @property
    def changed(self) -> bool:
        """Whether the buffer's values have changed; for a large buffer, whether it is another tensor."""
        now, copy = self.module._buffers.get(self.name), self.copy
        if copy is None or now is None:
            return now is not self.value
        if now.dtype != self.dtype or now.shape != copy.shape:
            return True
        return not torch.equal(now.to(copy.device, copy.dtype), copy)


class KeptState:
    """The state that a model keeps, as recorded when this object was made."""

    def __init__(self, base: nn.Module) -> None:
        named = list(base.named_modules())
        # A buffer on the meta device is another tensor after each call, because hooks fetch its values.
        self._buffers = [
            _Buffer.of(path, module, name)
            for path, module in named
            for name, value in module._buffers.items()
            if value is None or not value.is_meta
        ]
        self._attributes = [(path, module, _plain(module)) for path, module in named]

    def changed(self) -> tuple[str, list[str]]:
        """Return what has changed: `buffer` and the paths of buffers, else `attribute` and the paths of attributes."""
        if buffers := [buffer.path for buffer in self._buffers if buffer.changed]:
            return "buffer", buffers
        other = [(path, _plain(module).items() ^ before.items()) for path, module, before in self._attributes]
        return "attribute", [f"{path}.{name}".lstrip(".") for path, items in other for name in sorted(dict(items))]

    def refuse_other(self, first: Mapping[str, Tensor], again: Callable[[], Mapping[str, Tensor]]) -> None:
        """Refuse a model whose next call gives another result, because of state that it has kept.

        Args:
            first: the outputs of the call, by name.
            again: makes the call once more. It is not made if the model has kept nothing.

        Raises:
            StateError: an output differs.
        """
        kind, paths = self.changed()
        second = again() if paths else first
        other = [name for name, value in first.items() if not equal(second.get(name), value)]
        if other:
            what = f"the model's code changes its own {kind} when it runs, and its next call gives another {other[0]}"
            hint = "a graph starts from the same value in each call: pass the state as an argument, and return it"
            raise StateError(what, ", ".join(paths[:3]), hint)

    def restore_values(self) -> None:
        """Restore values that were written in place."""
        for buffer in self._buffers:
            if buffer.value is not None and buffer.copy is not None and not torch.equal(buffer.value, buffer.copy):
                with torch.no_grad():
                    buffer.value.copy_(buffer.copy)


def equal(one: Tensor | None, other: Tensor) -> bool:
    """Return whether two tensors have the same numbers, and NaN at the same places."""
    return one is not None and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _plain(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


@contextmanager
def state_kept(base: nn.Module) -> Iterator[KeptState]:
    """Let the model's code change its state while this context lasts, and restore all of it afterwards."""
    with unchanged(base):
        kept = KeptState(base)
        try:
            yield kept
        finally:
            kept.restore_values()


def run_kept(run: Callable[..., _T], graph: Graph, case: Mapping[str, Tensor]) -> _T:
    """Run a graph, and restore the buffers of its base, into which a graph writes as the model's own code does.

    Args:
        run: runs the graph on its flat inputs, as `graph.run` does.
        graph: the graph.
        case: the inputs by name.
    """
    with state_kept(graph.base):
        return run(*(case[spec.name] for spec in graph.inputs))
