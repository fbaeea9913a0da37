"""The command `peftfx demo`: train, export and serve an adapter, offline."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.voice import VOICE, tell


def demo(
    output: Annotated[
        Path | None, typer.Option(help="Directory to create; by default peftfx-demo, or peftfx-demo-generate.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Use a language model, SmolLM2-135M, and generate text.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
) -> None:
    """Fine-tune a real encoder on real text, export it merged, and run it in ONNX Runtime; offline, in minutes."""
    made = output or Path("peftfx-demo-generate" if generate else "peftfx-demo")
    with (
        contextlib.redirect_stdout(io.StringIO()) if VOICE.as_json or VOICE.quiet else contextlib.nullcontext() as said
    ):
        if generate:
            from peftfx.demo.generation import run_generation

            run_generation(made, force=force)
        else:
            from peftfx.demo.demo import run_demo

            run_demo(made, force=force)
    if said is not None:
        tell({"output": str(made), "report": said.getvalue()})
