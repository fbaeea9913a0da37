"""The memory that an export needs, estimated before it starts, and the memory that it used."""

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
_AT_ONCE = 3  #: tensors in memory at a time: a weight in fp32, the folded weight, and its rounded or transposed copy
_OWN = Path("/proc/self/statm")  #: this process's pages: total, resident, and resident but shared or backed by files
_EVERY = 0.02  #: seconds between two samples


def memory_needed(model: nn.Module) -> int:
    """Return the most anonymous memory that an export takes, in bytes, besides the loaded model.

    A model from safetensors files is mapped: it only takes memory that the kernel can drop.
    """
    return _FIXED + _AT_ONCE * 4 * max((p.numel() for p in model.parameters()), default=0)


def refuse_memory(model: nn.Module, limit: int | None) -> None:
    """Refuse a memory limit that is too small for the export."""
    needed = memory_needed(model)
    if limit is not None and limit < needed:
        hint = f"allow {needed / 1e9:.1f} GB or more: weights are read and written one at a time"
        raise PeftfxError(f"{limit:,} bytes are allowed, {needed:,} are needed", "max_memory", hint)


@dataclass
class MemoryPeak:
    """The peak memory of this process while it is watched, without mapped files.

    A thread samples the memory every 20 ms, so a shorter peak may be missed. The kernel's own high-water mark covers
    the whole life of a process, and counts mapped files, which need no memory.

    Attributes:
        bytes: the largest sample; 0 on systems other than Linux, which do not report it.
    """

    bytes: int = 0
    _ended: _thread.LockType = field(default_factory=_thread.allocate_lock, repr=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample the memory as long as this context lasts."""
        self.look()
        with self._ended:
            if self.bytes:
                with suppress(RuntimeError):  # no thread can be started: only the stage's start and end are sampled
                    # `threading` would wait until the thread runs: for ever, if there is no memory for it.
                    _thread.start_new_thread(self._watch, ())
            yield
            self.look()

    def look(self) -> None:
        """Take one sample."""
        with suppress(OSError):
            _, resident, shared, *_ = map(int, _OWN.read_bytes().split())
            self.bytes = max(self.bytes, (resident - shared) * os.sysconf("SC_PAGE_SIZE"))

    def _watch(self) -> None:
        with suppress(MemoryError):
            while not self._ended.acquire(timeout=_EVERY):
                self.look()
            self._ended.release()


def memory_line(memory: Mapping[str, int]) -> str:
    """Say the peak memory of each stage in words."""
    told = ", ".join(f"{name} {most / 1e9:.2f}" for name, most in memory.items())
    return f"{told} GB at most, without mapped files" if told else ""
