"""Stages: what an export does, one after another, each timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peftfx.telling import tell_stage

OnStage = Callable[[str], object]
"""Called with a line when a stage begins."""


class Stages:
    """Times the stages of an export, and says when each begins."""

    def __init__(self, seconds: dict[str, float], progress: OnStage) -> None:
        self.seconds, self.progress = seconds, progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        tell_stage(name)
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
