"""Pages that the site builds itself, and links that it shows as text because they lead to files of the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import typer.cli
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from peftfx.cli.main import app

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # what draws the layers also tests them
from house.layers_picture import page
from house.structure import ROOT, Structure

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the command line, made from its commands, and the page of the architecture."""
    command = typer.main.get_command(app)
    context = click.Context(command, info_name="peftfx")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="peftfx", title="Command line")
    files.append(File.generated(config, "command-line.md", content=text))
    files.append(File.generated(config, "architecture.md", content=page(Structure.of(ROOT))))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Show links to the repository's files as text: the site has none of these files."""
    return _OUTSIDE.sub(lambda found: found[1] if found[1].startswith("`") else f"`{found[1]}`", markdown)
