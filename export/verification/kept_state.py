"""KeptState: what a model's own code keeps in its buffers from one call to the next.

A graph has no such state: it computes from the buffers as they were when it was captured. So the reference of an export
starts each call from there too, and a model that computes something else in its next call is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError

_COPIED = 1 << 20  #: elements of a buffer that is copied, so that it can be put back


class StateError(PeftfxError):
    """A model computes something else in its next call, by what it has kept."""


class KeptState:
    """The buffers of a model, as they were when this was made."""

    def __init__(self, base: nn.Module) -> None:
        self._before: list[tuple[str, nn.Module, str, Tensor, Tensor | None]] = []
        for path, module in base.named_modules():
            for name, value in module._buffers.items():
                if value is not None and not value.is_meta:
                    copy = value.detach().clone() if value.numel() <= _COPIED else None
                    self._before.append((f"{path}.{name}".lstrip("."), module, name, value, copy))

    def changed(self) -> list[str]:
        """The paths of the buffers that have other values now; a large one counts where it is another tensor."""
        return [path for path, module, name, value, copy in self._before if _differs(module, name, value, copy)]

    def restore(self) -> None:
        """Put the buffers back, and their values, but those of large ones."""
        for _, module, name, value, copy in self._before:
            if _differs(module, name, value, copy):
                module._buffers[name] = value
                if copy is not None:
                    with torch.no_grad():
                        value.copy_(copy)


def _differs(module: nn.Module, name: str, value: Tensor, copy: Tensor | None) -> bool:
    now = module._buffers.get(name)
    if copy is None or now is None:
        return now is not value
    return now.dtype != copy.dtype or now.shape != copy.shape or not torch.equal(now.to(copy.device), copy)


@contextmanager
def buffers_kept(base: nn.Module) -> Iterator[KeptState]:
    """Inside, the model's code may change its buffers; afterwards they are as they were."""
    kept = KeptState(base)
    try:
        yield kept
    finally:
        kept.restore()
