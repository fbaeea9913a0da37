"""The output of commands: a report, and warnings as lines, without the output of other libraries."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from peftfx.cli.voice import VOICE, json_ready, tell
from peftfx.errors import PeftfxWarning


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and progress bars of other libraries while this context lasts."""
    if VOICE.verbose:
        with _logged():
            yield
        return
    with contextlib.ExitStack() as undone:
        import logging as standard
        import warnings

        from tqdm import tqdm
        from transformers.utils import logging

        undone.callback(setattr, standard, "lastResort", standard.lastResort)
        fake = standard.getLogger("torch._subclasses.fake_tensor")
        undone.callback(setattr, tqdm, "monitor_interval", tqdm.monitor_interval)
        undone.callback(setattr, standard, "raiseExceptions", standard.raiseExceptions)
        undone.callback(fake.setLevel, fake.level)
        undone.callback(logging.set_verbosity, logging.get_verbosity())
        undone.callback(
            logging.enable_progress_bar if logging.is_progress_bar_enabled() else logging.disable_progress_bar
        )
        undone.enter_context(warnings.catch_warnings())
        tqdm.monitor_interval = 0  # no thread for hidden bars: without free memory, starting one waits for ever
        standard.raiseExceptions = False  # without free memory, a failed log message prints no traceback
        standard.lastResort = None  # the handler that prints messages of libraries that set up no logging
        fake.setLevel(standard.CRITICAL)  # it also logs errors that it raises
        warnings.filterwarnings("ignore")
        warnings.simplefilter("always", PeftfxWarning)
        warnings.showwarning = _show_warning
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Print what the logger `peftfx` says about single steps, on stderr. Stages are printed there anyway."""
    import logging

    from peftfx.telling import LOG

    handler, level = logging.StreamHandler(), LOG.level
    handler.setFormatter(logging.Formatter("peftfx: %(message)s"))
    handler.addFilter(lambda record: record.levelno < logging.INFO)
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as a line, without its place in the code."""
    typer.echo(f"warning: {message}", err=True)


def print_report(report: object, output: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from peftfx.export.checkpoint.merged_report import MergedReport
    from peftfx.export.reports.report import Report

    assert isinstance(report, Report | MergedReport)
    if VOICE.as_json or VOICE.quiet:
        tell({"output": str(output), **json_ready(report)})
        return
    table = Table(title=f"{report.model} -> {output}", show_header=False, title_justify="left")
    for name, text in report.rows():
        table.add_row(name, escape(text))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
