"""Stages: what an export does, one after another; of each, the time and the most memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peftfx.export.writing.memory import MemoryPeak
from peftfx.telling import tell_stage

OnStage = Callable[[str], object]
"""Called with a line when a stage begins."""


class Stages:
    """Times the stages of an export, watches their memory, and says when each begins.

    Args:
        seconds: gets the wall time of each stage.
        memory: gets the most memory of each, in bytes; see `MemoryPeak`. Where it cannot be told, it gets nothing.
        progress: called with the name of a stage when it begins.
    """

    def __init__(self, seconds: dict[str, float], memory: dict[str, int], progress: OnStage) -> None:
        self.seconds, self.memory, self.progress = seconds, memory, progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        tell_stage(name)
        self.progress(name)
        start, peak = time.perf_counter(), MemoryPeak()
        with peak.watched():
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if peak.bytes:
            self.memory[name] = peak.bytes
