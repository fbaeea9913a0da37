"""Progress: how far an export is, on stderr: a line for each stage, and bytes, rate and time left while it writes."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from peftfx.cli.voice import VOICE

_EVERY = 5.0  #: seconds between two lines where stderr is not a terminal


class Progress:
    """Tells stages and bytes. On a terminal, the bytes are a bar; elsewhere, a line every few seconds."""

    def __init__(self) -> None:
        self._start = self._stage_start = self._told = time.perf_counter()
        self._silent = VOICE.quiet
        self._bar = _Bar() if sys.stderr.isatty() and not self._silent else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def stage(self, name: str) -> None:
        """Say that a stage begins."""
        self._close()
        self._stage_start = self._told = time.perf_counter()
        if not self._silent:
            print(f"[{self._stage_start - self._start:6.1f} s] {name}", file=sys.stderr, flush=True)

    def written(self, done: int, total: int) -> None:
        """Say how many bytes are written, of how many."""
        if self._bar is not None:
            self._bar.show(done, total)
            return
        now = time.perf_counter()
        if now - self._told >= _EVERY and not self._silent:
            self._told = now
            line = written_line(done, total, now - self._stage_start)
            print(f"[{now - self._start:6.1f} s]   {line}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def written_line(done: int, total: int, seconds: float) -> str:
    """Bytes, rate and time left, in words."""
    rate = done / seconds
    left = (total - done) / rate if rate else float("inf")
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, {left:.0f} s left"


class _Bar:
    """A bar on a terminal, from its first bytes on until it is closed."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task("write")
        self._shown = False

    def show(self, done: int, total: int) -> None:
        if not self._shown:
            self._bars.start()
            self._shown = True
        self._bars.update(self._task, completed=done, total=total)

    def close(self) -> None:
        if self._shown:
            self._bars.stop()
            self._shown = False
