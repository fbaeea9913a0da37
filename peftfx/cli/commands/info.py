"""The command `peftfx info`: say what a directory or a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.speech import quiet
from peftfx.cli.voice import tell
from peftfx.cli.words import found_base


def info(
    path: Annotated[
        Path, typer.Argument(help="An adapter, an export or a base in a directory, an .onnx_adapter, or a GGUF file.")
    ],
) -> None:
    """Print what a directory or a file holds: its rules, tensors and files, and what it was made from."""
    from peftfx.export.summaries.about import about

    with quiet():
        tell(about(found_base(path)))
