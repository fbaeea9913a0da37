"""KeptState: what a model's own code keeps from one call to the next, in its buffers and in plain attributes.

A graph has no such state: it computes from what there was when it was captured. So the reference of an export starts
each call from there too, and a model that computes something else in its next call is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError
from peftfx.graph.contexts import unchanged

_COPIED = 1 << 20  #: elements of a buffer that is copied, so that it can be put back
_PLAIN = (int, float, str, type(None))


class StateError(PeftfxError):
    """A model computes something else in its next call, by what it has kept."""


@dataclass(frozen=True)
class _Buffer:
    """A buffer as it was, and its values; of a large one these are not kept."""

    path: str
    module: nn.Module
    name: str
    value: Tensor | None
    copy: Tensor | None

    @classmethod
    def of(cls, path: str, module: nn.Module, name: str) -> _Buffer:
        value = module._buffers[name]
        small = value is not None and value.numel() <= _COPIED
        return cls(f"{path}.{name}".lstrip("."), module, name, value, value.detach().clone() if small else None)  # type: ignore[union-attr]

    @property
    def changed(self) -> bool:
        """Whether it has other values now; a large one where it is another tensor."""
        now, copy = self.module._buffers.get(self.name), self.copy
        if copy is None or now is None:
            return now is not self.value
        return now.dtype != copy.dtype or now.shape != copy.shape or not torch.equal(now.to(copy.device), copy)


class KeptState:
    """What a model keeps, as it was when this was made."""

    def __init__(self, base: nn.Module) -> None:
        named = list(base.named_modules())
        # A buffer on the meta device is another tensor behind each call, where hooks fetch its values.
        self._buffers = [
            _Buffer.of(path, module, name)
            for path, module in named
            for name, value in module._buffers.items()
            if value is None or not value.is_meta
        ]
        self._attributes = [(path, module, _plain(module)) for path, module in named]

    def changed(self) -> tuple[str, list[str]]:
        """What has other values now: `buffer`, and the paths of those; else `attribute`, and those."""
        if buffers := [buffer.path for buffer in self._buffers if buffer.changed]:
            return "buffer", buffers
        other = [(path, _plain(module).items() ^ before.items()) for path, module, before in self._attributes]
        return "attribute", [f"{path}.{name}".lstrip(".") for path, items in other for name in sorted(dict(items))]

    def restore_values(self) -> None:
        """Put values back that were written in place."""
        for buffer in self._buffers:
            if buffer.value is not None and buffer.copy is not None and not torch.equal(buffer.value, buffer.copy):
                with torch.no_grad():
                    buffer.value.copy_(buffer.copy)


def _plain(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


@contextmanager
def state_kept(base: nn.Module) -> Iterator[KeptState]:
    """Inside, the model's code may change what it keeps; afterwards all of it is as it was."""
    with unchanged(base):
        kept = KeptState(base)
        try:
            yield kept
        finally:
            kept.restore_values()
