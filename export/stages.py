"""The stages of an export, one after another: their time and their peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peftfx.export.writing.memory import MemoryPeak
from peftfx.telling import tell_stage

OnStage = Callable[[str], object]
"""A function that is called with a line when a stage begins."""


class Stages:
    """A timer for the stages of an export. It also watches their memory, and says when each stage begins.

    Args:
        seconds: gets the wall time of each stage.
        memory: gets the peak memory of each stage, in bytes; see `MemoryPeak`. It gets nothing if memory cannot be
            measured.
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
