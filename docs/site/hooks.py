"""What the site adds to the documents: the command line's page, and links to files that are no pages as their names."""

from __future__ import annotations

import re

import click
import typer.cli
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from peftfx.cli.main import app

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The commands and their options, from the commands themselves."""
    command = typer.main.get_command(app)
    context = click.Context(command, info_name="peftfx")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="peftfx", title="Command line")
    files.append(File.generated(config, "command-line.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A document links to the repository's files; the site has none of them."""
    return _OUTSIDE.sub(lambda found: found[1] if found[1].startswith("`") else f"`{found[1]}`", markdown)
