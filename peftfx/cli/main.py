"""The command line, with one file for each command in `commands/`. An error is one message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from peftfx.cli.commands.convert import convert
from peftfx.cli.commands.demo import demo
from peftfx.cli.commands.diff import diff
from peftfx.cli.commands.export import export
from peftfx.cli.commands.export_adapter import export_adapter
from peftfx.cli.commands.info import info
from peftfx.cli.commands.inspect import inspect
from peftfx.cli.commands.merge import merge
from peftfx.cli.commands.methods import methods
from peftfx.cli.commands.report import report
from peftfx.cli.commands.run import run
from peftfx.cli.commands.train import train
from peftfx.cli.garbage import rarely_to_the_end
from peftfx.cli.once import GivenOnce
from peftfx.cli.signals import Terminated, orderly_end
from peftfx.cli.streams import take_any_text, written_out
from peftfx.cli.voice import VOICE, spoken, tell_error
from peftfx.errors import PeftfxError, out_of_memory
from peftfx.version import __version__

app = typer.Typer(
    name="peftfx",
    help="Takes PEFT adapters from training to deployment: one merged ONNX model that ONNX Runtime serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app.command(cls=GivenOnce)(spoken(export))
app.command(cls=GivenOnce)(spoken(merge))
app.command(cls=GivenOnce)(spoken(convert))
app.command(name="export-adapter", cls=GivenOnce)(spoken(export_adapter))
app.command(cls=GivenOnce)(spoken(inspect))
app.command(cls=GivenOnce)(spoken(info))
app.command(cls=GivenOnce)(spoken(diff))
app.command(cls=GivenOnce)(spoken(methods))
app.command(cls=GivenOnce)(spoken(report))
app.command(cls=GivenOnce)(spoken(run))
app.command(cls=GivenOnce)(spoken(train))
app.command(cls=GivenOnce)(spoken(demo))


def main() -> None:
    """Run the command line.

    A PeftfxError is printed as a message on stderr, and gives its class's exit code: 2, or 1 for a failed verification.
    SIGINT (Ctrl+C), SIGTERM and SIGHUP end the command like an error: half-written files are removed, and the exit code
    is 128 plus the signal's number.
    """
    take_any_text()
    VOICE.as_json = VOICE.quiet = VOICE.verbose = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads this when imported: large pages for large tensors
    try:
        with orderly_end(), rarely_to_the_end(), written_out():
            app()
    except PeftfxError as error:
        tell_error(error)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0] or "no more can be had"
        print(f"peftfx: error: out of memory: {first}\n  hint: free some; no output was written", file=sys.stderr)
        sys.exit(PeftfxError.exit_code)
    except Terminated as end:
        word = "interrupted" if end.signal == signal.SIGINT else "terminated"
        print(f"peftfx: {word}; no unfinished output is left", file=sys.stderr)
        sys.exit(128 + end.signal)
