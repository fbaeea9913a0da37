"""The bar that a demo's training shows, on stderr: steps, time, the last loss, and the memory that it has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftfx.model.trainer_callbacks import peak_memory

_Told = Callable[[float], None]


@contextmanager
def training_bar(steps: int, console: Console | None = None) -> Iterator[_Told]:
    """Inside, a bar of so many steps; what it gives is told the loss after each.

    Where stderr is no terminal, the bar is printed once, when it ends.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    fields = (TextColumn("loss {task.fields[loss]:.3f}"), TextColumn("peak {task.fields[memory]:.2f} GB"))
    shown = Progress(TextColumn("{task.description}"), *columns, *fields, console=console or Console(stderr=True))
    with shown:
        task = shown.add_task("training", total=steps, loss=float("nan"), memory=peak_memory())
        yield lambda loss: shown.update(task, advance=1, loss=loss, memory=peak_memory())
