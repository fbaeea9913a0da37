"""`peftfx demo`: the whole way, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path | None, typer.Option(help="Directory to make; by default peftfx-demo, or peftfx-demo-generate.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="With a language model, SmolLM2-135M, that then generates.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
) -> None:
    """Fine-tune a real encoder on real text, export it merged, serve it in ONNX Runtime; offline, in minutes."""
    if generate:
        from peftfx.demo.generation import run_generation

        run_generation(output or Path("peftfx-demo-generate"), force=force)
        return
    from peftfx.demo.demo import run_demo

    run_demo(output or Path("peftfx-demo"), force=force)
