"""The command `peftfx report`: show what an export did, from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.voice import tell


def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories of exports; several are shown side by side.")],
    html: Annotated[Path, typer.Option(help="File to write the page to.")],
) -> None:
    """Write a page of what exports did: where each tensor went, errors by output and size, time, files, fusions."""
    from peftfx.export.reports.report_page import report_page

    report_page(directories).save(html)
    size = html.stat().st_size
    tell({"output": str(html), "bytes": size}, f"{html}: {size:,} B")
