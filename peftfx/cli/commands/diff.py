"""The command `peftfx diff`: compare two adapters or two exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.speech import quiet
from peftfx.cli.voice import tell


def diff(
    first: Annotated[Path, typer.Argument(help="Directory of an adapter, or of an export.")],
    second: Annotated[Path, typer.Argument(help="Another adapter, or another export.")],
) -> None:
    """Print the differences of two adapters or two exports. Exit codes: 0 no difference; 1 differences; 2 bad input."""
    from peftfx.export.summaries.differences import differences

    with quiet():
        found = differences(first, second)
    tell(found)
    if found.any:
        raise typer.Exit(1)
