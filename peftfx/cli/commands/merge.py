"""The command `peftfx merge`: fold an adapter into a base, and write a transformers directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.garbage import kept_to_the_end
from peftfx.cli.speech import print_report, quiet
from peftfx.cli.words import Download, choice, dtype_named, found_base, task_choice
from peftfx.export_options.merge import MergeOptions
from peftfx.options import BASE_QUANTIZATIONS, DTYPES


def merge(
    base: Annotated[
        Path, typer.Option(help="Directory of the base model (transformers), quantised too, org/name, or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option(help="Directory to create; it appears only when the result is verified.")],
    adapter: Annotated[
        Path | None, typer.Option(help="HF PEFT directory; without it a quantised base is written in floating point.")
    ] = None,
    task: Annotated[str | None, task_choice("the adapter's or the model's")] = None,
    task_id: Annotated[
        int | None, typer.Option(help="The task to merge, from 0, of an adapter of several (Poly).")
    ] = None,
    dtype: Annotated[
        str | None, choice(DTYPES, "Of the weights; by default the base's own, and fp32 for a quantised base.")
    ] = None,
    quantize_base: Annotated[
        str | None,
        choice(BASE_QUANTIZATIONS, "Make of a base in floating point what a QLoRA was trained on (load_in_4bit)."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="nf4 (bitsandbytes), int4 or int8 (compressed-tensors): quantise merged weights, also by role."
        ),
    ] = None,
    max_error: Annotated[str | None, typer.Option(help="Limit of the quantisation error; see export.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file to compare a quantised model on; by default text that the model writes."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a file of weights.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the output directory if it exists.")] = False,
    download: Download = False,
) -> None:
    """Write a base with an adapter folded in as a transformers directory, for vLLM, llama.cpp's converter and others.

    Weights are computed and written one at a time. Exit codes: those of `export`.
    """
    chosen = {
        "adapter": adapter,
        "task": task,
        "task_id": task_id,
        "dtype": dtype_named(dtype),
        "quantize_base": quantize_base,
        "quantize": quantize,
        "max_error": max_error,
        "calibration": calibration,
        "max_shard_size": max_shard_size,
        "force": force,
    }
    asked = MergeOptions.of(None, chosen)
    with kept_to_the_end():
        from peftfx.cli.progress import Progress
        from peftfx.export.merge_command import merge_directory

    with quiet(), Progress() as progress:
        base = found_base(base, download=download)
        report = merge_directory(base, output, asked, progress=progress.stage, written=progress.written)
    print_report(report, output)
