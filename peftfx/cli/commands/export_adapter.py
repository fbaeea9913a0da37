"""The command `peftfx export-adapter`: write an adapter for a graph that has slots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.garbage import kept_to_the_end
from peftfx.cli.speech import quiet
from peftfx.cli.voice import tell
from peftfx.cli.words import Download, choice, found_base
from peftfx.export_options.adapter import AdapterDirectoryOptions
from peftfx.options import COMBINATIONS


def export_adapter(
    adapter: Annotated[
        list[str], typer.Option(help="HF PEFT directory, or DIR=WEIGHT; repeat it to add the effects of several.")
    ],
    graph: Annotated[Path, typer.Option("--for", help="Directory that `peftfx export --swappable` wrote.")],
    output: Annotated[Path, typer.Option(help="File to create; .onnx_adapter is added to its name if missing.")],
    base: Annotated[
        Path | None,
        typer.Option(help="The base model, as export takes it; by default where the graph was exported from."),
    ] = None,
    combination: Annotated[
        str, choice(COMBINATIONS, "How weighted adapters are combined: cat (LoRA, exactly) or linear (LoRA, IA3).")
    ] = "cat",
    check: Annotated[bool, typer.Option(help="Compare its effect in ONNX Runtime with torch.")] = True,
    atol: Annotated[
        float | None, typer.Option(help="Absolute tolerance of outputs; by default it is measured in float64.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance relative to the largest magnitude of an output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    download: Download = False,
) -> None:
    """Write an adapter of any method as an .onnx_adapter file, for a graph that has slots.

    Exit codes: those of `export`.
    """
    base = None if base is None else found_base(base, download=download)
    options = {"base": base, "combination": combination, "check": check, "force": force, "atol": atol, "rtol": rtol}
    asked = AdapterDirectoryOptions.of(None, options)
    with kept_to_the_end():
        from peftfx.cli.progress import Progress
        from peftfx.export.adapter_command import export_adapter_directories
        from peftfx.serving.adapter_file import adapter_files

    with quiet(), Progress() as progress:
        made = export_adapter_directories(adapter, graph, output, asked, progress=progress.stage)
    size = sum(file.stat().st_size for file in adapter_files(made))
    tell({"output": str(made), "bytes": size}, f"{made}: {size:,} B")
