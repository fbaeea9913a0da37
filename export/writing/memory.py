"""Memory: what an export needs, told before it starts; and what it took."""

from __future__ import annotations

import _thread
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from peftfx.errors import PeftfxError

_FIXED = 1 << 30  #: bytes for the libraries, the graph, and ONNX Runtime's activations
_AT_ONCE = 3  #: tensors in memory at a time: a weight in fp32, what it is folded to, and its rounding or transpose
_OWN = Path("/proc/self/statm")  #: of this process, in pages: in all, resident, and of these backed by files or shared
_EVERY = 0.02  #: seconds between two looks


def memory_needed(model: nn.Module) -> int:
    """The most anonymous memory an export takes, in bytes, beyond the model as it is loaded.

    A model from safetensors files is mapped: it is in no memory but what the kernel can drop.
    """
    return _FIXED + _AT_ONCE * 4 * max((p.numel() for p in model.parameters()), default=0)


def refuse_memory(model: nn.Module, limit: int | None) -> None:
    """Refuse a limit that the export could not keep to."""
    needed = memory_needed(model)
    if limit is not None and limit < needed:
        hint = f"allow {needed / 1e9:.1f} GB or more: weights are read and written one at a time"
        raise PeftfxError(f"{limit:,} bytes are allowed, {needed:,} are needed", "max_memory", hint)


@dataclass
class MemoryPeak:
    """The most memory that this process has while it is watched, beyond files that are mapped.

    A thread looks every 20 ms: a peak that is shorter may be missed. The kernel's own high-water mark is of the whole
    life of a process, and counts mapped files too, which need no memory.

    Attributes:
        bytes: the most that was seen; 0 where the system does not tell it, as all but Linux.
    """

    bytes: int = 0
    _ended: _thread.LockType = field(default_factory=_thread.allocate_lock, repr=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look as long as this lasts."""
        self.look()
        with self._ended:
            if self.bytes:
                with suppress(RuntimeError):  # no thread is to be had: the ends of the stage are looked at
                    # `threading` would wait until the thread runs, which is for ever where there is no memory for it.
                    _thread.start_new_thread(self._watch, ())
            yield
            self.look()

    def look(self) -> None:
        """Look once."""
        with suppress(OSError):
            _, resident, shared, *_ = map(int, _OWN.read_bytes().split())
            self.bytes = max(self.bytes, (resident - shared) * os.sysconf("SC_PAGE_SIZE"))

    def _watch(self) -> None:
        with suppress(MemoryError):
            while not self._ended.acquire(timeout=_EVERY):
                self.look()
            self._ended.release()


def memory_line(memory: Mapping[str, int]) -> str:
    """The most memory of each stage, in words."""
    told = ", ".join(f"{name} {most / 1e9:.2f}" for name, most in memory.items())
    return f"{told} GB at most, beyond files that are mapped" if told else ""
