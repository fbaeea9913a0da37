"""The command `peftfx methods`: list the methods and their options."""

from __future__ import annotations

from typing import Annotated

import typer

from peftfx.cli.voice import tell


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, such as lora: print its options.")] = None,
) -> None:
    """Print the methods that a rule can name, or the options of one method."""
    from peftfx.rules.catalogue import catalogue, describe
    from peftfx.rules.text import method_by_name

    found = catalogue() if name is None else (describe(method_by_name(name)),)
    width = max(len(method.name) for method in found)
    lines = (f"{method.name:{width}}  {method.title}" for method in found)
    tell([method.to_dict() for method in found], "\n".join(lines) if name is None else found[0])
