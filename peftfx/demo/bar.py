"""The progress bar of a demo's training, on stderr: steps, time, the last loss, and the peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftfx.model.trainers.callbacks import peak_memory

_Told = Callable[[float], None]


@contextmanager
def training_bar(steps: int, console: Console | None = None) -> Iterator[_Told]:
    """Show a bar of `steps` steps. The yielded function takes the loss after each step.

    If stderr is not a terminal, the bar is printed once, at the end.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    fields = (TextColumn("loss {task.fields[loss]:.3f}"), TextColumn("peak {task.fields[memory]:.2f} GB"))
    shown = Progress(TextColumn("{task.description}"), *columns, *fields, console=console or Console(stderr=True))
    with shown:
        task = shown.add_task("training", total=steps, loss=float("nan"), memory=peak_memory())
        yield lambda loss: shown.update(task, advance=1, loss=loss, memory=peak_memory())
