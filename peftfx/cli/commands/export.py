"""The command `peftfx export`: export a model to ONNX, with or without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.garbage import kept_to_the_end
from peftfx.cli.own_code import passes_named
from peftfx.cli.speech import print_report, quiet
from peftfx.cli.voice import tell
from peftfx.cli.words import Download, choice, chosen_slots, dtype_named, found_base, named_directories, task_choice
from peftfx.errors import PeftfxError
from peftfx.export_options.directory import DirectoryOptions
from peftfx.options import BASE_QUANTIZATIONS, DTYPES, ENGINES, PROVIDERS, VIEWS


def export(
    base: Annotated[
        Path,
        typer.Option(help="Directory of the base model (transformers, or diffusers), org/name, or a GGUF file."),
    ],
    output: Annotated[Path, typer.Option(help="Directory to create; it appears only when the result is verified.")],
    adapter: Annotated[
        Path | None, typer.Option(help="HF PEFT directory of the adapter; without it the base alone is exported.")
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge",
            help="Fold the adapter into the weights, or leave it apart in the graph; by default it is folded, "
            "but for a quantised base, whose weights stay what they are.",
        ),
    ] = None,
    task: Annotated[str | None, task_choice("the adapter's or the model's")] = None,
    view: Annotated[
        str,
        choice(
            VIEWS,
            "What is exported: decode has the cache in and out; auto is decode for a model that generates text, and "
            "forward for one that reads images beside it.",
        ),
    ] = "auto",
    opset: Annotated[int | None, typer.Option(help="Version of the ONNX operators.")] = None,
    task_id: Annotated[
        int | None,
        typer.Option(
            help="The task to take, from 0, of an adapter of several (Poly, multitask prompts). "
            "With --batched and without it, rows choose among all of them, as NAME_0 and so on."
        ),
    ] = None,
    dtype: Annotated[
        str | None, choice(DTYPES, "Of the weights; by default the base's own, but fp32 for a bfloat16 base.")
    ] = None,
    engine: Annotated[
        str, choice(ENGINES, "fast (the default), or torch to use torch.onnx for the whole model.")
    ] = "fast",
    optimize: Annotated[
        str,
        choice(PROVIDERS, "cpu, cuda: attentions and norms as one operator each (opset 23); none: in their parts."),
    ] = "cpu",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8, int4 or nf4: round weights of products; with options, and by role, as in "
            "'int4(block=64, symmetric=False); int8@head'."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Size limit for all weights, such as 1.2GB: chooses the bits of each role to fit it."),
    ] = None,
    quantize_base: Annotated[
        str | None,
        choice(BASE_QUANTIZATIONS, "Make of a base in floating point what a QLoRA was trained on (load_in_4bit)."),
    ] = None,
    max_error: Annotated[
        str | None,
        typer.Option(
            help="Limit of the quantisation error: kl=0.05 (nats), top1=0.9 (share of equal tokens) or 0.1 (relative "
            "to an output's largest magnitude); beyond it, exit 1."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file to compare a quantised model on; by default text that the model writes."),
    ] = None,
    atol: Annotated[
        float | None, typer.Option(help="Absolute tolerance of outputs; by default it is measured in float64.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance relative to the largest magnitude of an output.")
    ] = None,
    batched: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR of an adapter; repeat it for more. Each row of a batch chooses one."),
    ] = None,
    swappable: Annotated[
        bool, typer.Option("--swappable", help="Make a graph into which adapters can be loaded while it runs.")
    ] = False,
    slots: Annotated[
        str | None,
        typer.Option(help="With --swappable: the layers that adapters can use, as a target (default all-linear)."),
    ] = None,
    prefix: Annotated[
        bool, typer.Option(help="With --swappable: also allow soft prompts (each step then copies the cache).")
    ] = True,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", help="A pass of your own, such as my_rules:TANH; repeat it for more. They run in order."
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Memory limit, such as 4GB: refuse to start if more is needed (mapped files do not count)."),
    ] = None,
    allow_fixed: Annotated[
        bool,
        typer.Option(
            "--allow-fixed", help="Also export a model that is right only for some sizes; the report says for which."
        ),
    ] = False,
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Height and width of images, such as 384x512; any leaves them free; by default the model's own."
        ),
    ] = None,
    videos: Annotated[
        bool,
        typer.Option("--videos", help="Also export the graph of videos beside a text, for --view decode."),
    ] = False,
    merged_decoder: Annotated[
        bool,
        typer.Option("--merged-decoder", help="Also write the decoder of an encoder-decoder as optimum reads it."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output directory if it exists.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written, its size and the time; write nothing.")
    ] = False,
    download: Download = False,
) -> None:
    """Export a model, with or without an adapter, to ONNX, and check it in ONNX Runtime.

    Writes OUTPUT/model.onnx (and model.onnx.data), the config, tokenizer and processor files, and peftfx_report.json.
    Exit codes: 0 done; 1 ONNX Runtime and torch disagree, or rounding costs more than --max-error; 2 bad input. After
    1 and 2 no output is left.
    """
    chosen = {
        "adapter": adapter,
        "merge": merge,
        "task": task,
        "task_id": task_id,
        "view": view,
        "dtype": dtype_named(dtype),
        "engine": engine,
        "optimize": optimize,
        "quantize": quantize,
        "budget": budget,
        "quantize_base": quantize_base,
        "opset": opset,
        "max_error": max_error,
        "calibration": calibration,
        "atol": atol,
        "rtol": rtol,
        "batched": named_directories(batched or ()),
        "slots": chosen_slots(slots, swappable=swappable, prefix=prefix),
        "force": force,
        "allow_fixed": allow_fixed,
        "image_size": image_size,
        "videos": videos,
        "merged_decoder": merged_decoder,
        "max_memory": max_memory,
    }
    asked = DirectoryOptions.of(None, chosen)
    base = found_base(base, download=download)
    with kept_to_the_end():
        from peftfx.export.pipeline_command import export_pipeline, is_pipeline

    if is_pipeline(base) and (dry_run or passes):
        what = "--dry-run and --pass are for one model, but this is a pipeline of several models"
        raise PeftfxError(what, str(base), "give the folder of one of its models")
    if is_pipeline(base):
        from peftfx.cli.progress import Progress

        with quiet(), Progress() as progress:
            reports = export_pipeline(base, output, asked, progress=progress.stage)
        for folder, report in reports.items():
            print_report(report, output / folder)
        return
    if dry_run:
        from peftfx.export.summaries.dry_run import dry_run as run

        with quiet():
            passes_named(passes or ())  # refuses a pass that does not exist
            tell(run(base, output, asked))
        return
    from peftfx.cli.progress import Progress
    from peftfx.export.command import export_directory

    with quiet(), Progress() as progress:
        own = passes_named(passes or ())
        report = export_directory(base, output, asked, progress=progress.stage, written=progress.written, passes=own)
    print_report(report, output)
