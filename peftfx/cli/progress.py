"""Show the progress of an export on stderr: a line for each stage, and how much of the stage is done.

On a terminal, a bar shows the layers of a capture, the calls of a verification and the written bytes, with the
remaining time. Elsewhere, the written bytes are printed as lines.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from peftfx.cli.voice import VOICE
from peftfx.telling import listening

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

_EVERY = 5.0  #: seconds between two lines if stderr is not a terminal


class Progress:
    """Shows stages and their progress: on a terminal as a bar, elsewhere as a line of bytes every few seconds."""

    def __init__(self) -> None:
        self._start = self._stage_start = self._told = time.perf_counter()
        self._silent = VOICE.quiet
        shown = sys.stderr.isatty() and not self._silent and not VOICE.as_json
        self._bar = _Bar() if shown else None
        self._undone = ExitStack()

    def __enter__(self) -> Self:
        self._undone.enter_context(listening(None if self._bar is None else self._bar.share))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undone.close()
        self._close()

    def stage(self, name: str) -> None:
        """Show that a stage begins."""
        self._close()
        self._stage_start = self._told = time.perf_counter()
        if not self._silent:
            print(f"[{self._stage_start - self._start:6.1f} s] {name}", file=sys.stderr, flush=True)

    def written(self, done: int, total: int) -> None:
        """Show how many bytes are written, and the total."""
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
    """Say in words how many bytes are written, at which rate, and how much time is left."""
    rate = done / seconds
    left = (total - done) / rate if rate else float("inf")
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, {left:.0f} s left"


def share_line(words: str, share: float, seconds: float) -> str:
    """Say in words how much of a stage is done, and the time left. No time is given in the first second."""
    left = f", {seconds * (1 - share) / share:.0f} s left" if share > 0 and seconds >= 1 else ""
    return f"{words}{left}"


class _Bar:
    """A bar on a terminal that shows bytes or the share of a stage, until it is closed."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._bytes = False
        self._begun = self._share = 0.0

    def show(self, done: int, total: int) -> None:
        """Show the written bytes."""
        bars = self._opened(of_bytes=True)
        bars.update(bars.task_ids[0], completed=done, total=total)

    def share(self, words: str, share: float) -> None:
        """Show the finished share of a stage. If the share falls, another piece of work has begun."""
        bars, now = self._opened(of_bytes=False), time.perf_counter()
        if share < self._share or not self._begun:
            self._begun = now
        self._share = share
        line = share_line(words, share, now - self._begun)
        bars.update(bars.task_ids[0], completed=share, total=1.0, description=line)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._begun, self._share = None, 0.0, 0.0

    def _opened(self, *, of_bytes: bool) -> Bars:
        if self._bars is not None and self._bytes == of_bytes:
            return self._bars
        self.close()
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        of_shares = (BarColumn(), TextColumn("{task.description}"))
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bars = Bars(*(columns if of_bytes else of_shares), console=Console(stderr=True), transient=True)
        self._bars.add_task("")
        self._bars.start()
        self._bytes = of_bytes
        return self._bars
