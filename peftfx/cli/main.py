"""The command line: `peftfx export`, `run`, `inspect` and `demo`. Errors are one message and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.signals import Terminated, orderly_end
from peftfx.cli.words import check_looks, check_run, chosen_slots, named_directories
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export_options.adapter import AdapterDirectoryOptions
from peftfx.export_options.directory import DirectoryOptions
from peftfx.export_options.merge import MergeOptions
from peftfx.version import __version__

app = typer.Typer(
    name="peftfx",
    help="Takes PEFT adapters from training to deployment: one merged ONNX model that ONNX Runtime serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def export(
    base: Annotated[
        Path, typer.Option(help="Directory of the base model (transformers, or a diffusers model), or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option(help="Directory to make; it appears when it is complete and verified.")],
    adapter: Annotated[Path | None, typer.Option(help="HF PEFT directory; without one the base is exported.")] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge",
            help="Fold the adapter into the weights, or leave it apart in the graph; by default it is folded, "
            "but for a quantised base, whose weights stay what they are.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Pipeline name, as text-classification; by default the adapter's or the model's.")
    ] = None,
    view: Annotated[
        str,
        typer.Option(help="forward, decode (cache in and out), or auto: decode for a model that generates text."),
    ] = "auto",
    opset: Annotated[int | None, typer.Option(help="Version of the ONNX operators.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; by default the base's own, but fp32 for a bfloat16 base.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="fast translates each distinct operation once; torch is torch.onnx's own road.")
    ] = "fast",
    optimize: Annotated[
        str,
        typer.Option(help="cpu or cuda: attentions and norms as one operator each (opset 23); none: in their parts."),
    ] = "cpu",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8, int4 or nf4: round weights of products; with options, and by role, as in "
            "'int4(block=64, symmetric=False); int8@head'."
        ),
    ] = None,
    quantize_base: Annotated[
        str | None,
        typer.Option(help="nf4: make of a base in floating point what a QLoRA was trained on (load_in_4bit)."),
    ] = None,
    max_error: Annotated[
        str | None,
        typer.Option(
            help="What quantisation may cost, as kl=0.05 (nats), top1=0.9 (share that agrees) or 0.1 (of an output's "
            "largest magnitude); beyond it: exit 1."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text that a quantised model is compared on; by default its own greedy text.")
    ] = None,
    atol: Annotated[
        float | None, typer.Option(help="What an output may differ by; by default measured against float64.")
    ] = None,
    rtol: Annotated[float | None, typer.Option(help="The same, over its largest magnitude.")] = None,
    batched: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR of an adapter, given again: each row of a batch chooses one.")
    ] = None,
    swappable: Annotated[
        bool, typer.Option("--swappable", help="Leave places in which adapters are put when the model runs.")
    ] = False,
    slots: Annotated[
        str | None, typer.Option(help="With --swappable, the layers that have such a place, as a target: all-linear.")
    ] = None,
    prefix: Annotated[
        bool, typer.Option(help="With --swappable, a place for soft prompts, for which keys and values are copied.")
    ] = True,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Refuse to start if the export needs more, as 4GB; mapped files are free."),
    ] = None,
    allow_fixed: Annotated[
        bool,
        typer.Option("--allow-fixed", help="Export what is right for some sizes alone; the report says for which."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output directory if it exists.")] = False,
) -> None:
    """Export a model, with or without an adapter, to ONNX, and check it in ONNX Runtime.

    Writes OUTPUT/model.onnx (and model.onnx.data), the config, tokenizer and processor files, and
    peftfx_report.json. Exit codes: 0 done; 1 ONNX Runtime and torch disagree, nothing is left; 2 bad input.
    """
    chosen = {
        "adapter": adapter,
        "merge": merge,
        "task": task,
        "view": view,
        "dtype": dtype,
        "engine": engine,
        "optimize": optimize,
        "quantize": quantize,
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
        "max_memory": max_memory,
    }
    asked = DirectoryOptions.of(None, chosen)
    from peftfx.cli.progress import Progress
    from peftfx.export.command import export_directory

    with _quiet(), Progress() as progress:
        report = export_directory(base, output, asked, progress=progress.stage, written=progress.written)
    _print_report(report, output)


@app.command()
def merge(
    base: Annotated[
        Path, typer.Option(help="Directory of the base model (transformers), quantised too, or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option(help="Directory to make; it appears when it is complete and verified.")],
    adapter: Annotated[
        Path | None, typer.Option(help="HF PEFT directory; without one a quantised base is written in floating point.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Pipeline name, as text-classification; by default the adapter's or the model's.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; by default the base's own, and fp32 for a quantised base.")
    ] = None,
    quantize_base: Annotated[
        str | None,
        typer.Option(help="nf4: make of a base in floating point what a QLoRA was trained on (load_in_4bit)."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the output directory if it exists.")] = False,
) -> None:
    """Write a base with an adapter folded in as a transformers directory: for vLLM, llama.cpp's converter and others.

    Weights are made and written one at a time. Exit codes: as of export.
    """
    chosen = {
        "adapter": adapter,
        "task": task,
        "dtype": dtype,
        "quantize_base": quantize_base,
        "max_shard_size": max_shard_size,
        "force": force,
    }
    asked = MergeOptions.of(None, chosen)
    from peftfx.cli.progress import Progress
    from peftfx.export.merge_command import merge_directory

    with _quiet(), Progress() as progress:
        report = merge_directory(base, output, asked, progress=progress.stage, written=progress.written)
    _print_report(report, output)


@app.command()
def convert(
    base: Annotated[Path, typer.Option(help="Directory of the base model (transformers, or a diffusers model).")],
    output: Annotated[Path, typer.Option(help="Directory to make, or with --to kohya or diffusers a file.")],
    adapter: Annotated[Path | None, typer.Option(help="HF PEFT directory, of any method that acts on weights.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Directory of another checkpoint: its difference.")] = None,
    file: Annotated[Path | None, typer.Option(help="A single file of kohya's or of diffusers'.")] = None,
    rank: Annotated[
        str | None, typer.Option(help="Of the LoRA (16), or the share of the energy that it keeps (0.95).")
    ] = None,
    to: Annotated[str, typer.Option(help="peft, kohya or diffusers.")] = "peft",
    prefix: Annotated[str, typer.Option(help="Of the keys of a single file.")] = "lora_unet",
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
) -> None:
    """Write an adapter, the difference of two checkpoints or a single file as a LoRA. Exit codes: as of export."""
    from peftfx.export.convert_command import convert_directory

    with _quiet():
        made = convert_directory(
            base,
            output,
            adapter=adapter,
            tuned=tuned,
            file=file,
            rank=_rank(rank),
            to=to,
            prefix=prefix,
            force=force,
        )
    print(made)


def _rank(text: str | None) -> float | None:
    """A whole number is a rank, another one a share."""
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise PeftfxError(f"no number: {text!r}", "rank", "--rank 16, or --rank 0.95") from error


@app.command(name="export-adapter")
def export_adapter(
    adapter: Annotated[list[str], typer.Option(help="HF PEFT directory, or DIR=WEIGHT; given again, effects add up.")],
    graph: Annotated[Path, typer.Option("--for", help="Directory that `peftfx export --swappable` wrote.")],
    output: Annotated[Path, typer.Option(help="File to make; .onnx_adapter is added to its name if it is not there.")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model; by default where the graph was exported from.")
    ] = None,
    combination: Annotated[
        str, typer.Option(help="How weighted adapters are combined: cat (LoRA, exactly) or linear (LoRA, IA3).")
    ] = "cat",
    check: Annotated[bool, typer.Option(help="Hold what it does in ONNX Runtime against torch.")] = True,
    atol: Annotated[
        float | None, typer.Option(help="What an output may differ by; by default measured against float64.")
    ] = None,
    rtol: Annotated[float | None, typer.Option(help="The same, over its largest magnitude.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write an adapter of any method as an .onnx_adapter file, for a graph that has places for it.

    Exit codes: as of export.
    """
    options = {"base": base, "combination": combination, "check": check, "force": force, "atol": atol, "rtol": rtol}
    asked = AdapterDirectoryOptions.of(None, options)
    from peftfx.cli.progress import Progress
    from peftfx.export.adapter_command import export_adapter_directories

    with _quiet(), Progress() as progress:
        made = export_adapter_directories(adapter, graph, output, asked, progress=progress.stage)
    print(f"{made}: {made.stat().st_size:,} B")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Directory of a model; its config is enough.")],
    task: Annotated[str | None, typer.Option(help="Pipeline name; by default the model's own.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Show only what this target picks, as 'attention.query | mlp'.")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(help="Show what these would do, as 'lora(r=8)@attention.query; ia3@mlp'; see `peftfx methods`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    network: Annotated[
        bool, typer.Option("--network", help="Print which site reads what another gave, as JSON (node-link).")
    ] = False,
    graphml: Annotated[Path | None, typer.Option(help="File to write the same to, as GraphML.")] = None,
) -> None:
    """Print where adapters can act: each site's module path, kind, role, layer and shape; or what rules would do."""
    import json

    check_looks(task, target, rules, drawn=network or graphml is not None)
    from rich.console import Console

    from peftfx.export.command import inspect_directory, plan_directory
    from peftfx.sites.network import to_json, write_graphml

    if rules is not None:
        with _quiet():
            plan = plan_directory(model, rules, task=task)
        print(json.dumps(plan.to_dict(), indent=2) if as_json else plan)
        return
    with _quiet():
        sites = inspect_directory(model, task=task, target=target)
    if graphml is not None:
        write_graphml(sites.network(), graphml)
    if network:
        print(json.dumps(to_json(sites.network()), indent=2))
    elif as_json:
        print(json.dumps([site.to_dict() for site in sites], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(sites.table())


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Of one method, as lora: print its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the methods, or one method's options: what a rule can say."""
    import json

    from peftfx.rules.catalogue import catalogue, describe
    from peftfx.rules.text import method_by_name

    found = catalogue() if name is None else (describe(method_by_name(name)),)
    if as_json:
        print(json.dumps([method.to_dict() for method in found], indent=2))
    elif name is None:
        width = max(len(method.name) for method in found)
        print("\n".join(f"{method.name:{width}}  {method.title}" for method in found))
    else:
        print(found[0])


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Directory that `peftfx export` wrote.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue; it streams.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text for the model's task; may be given again.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image for the model's task; may be given again.")] = None,
    task: Annotated[str | None, typer.Option(help="Pipeline name; by default what the model was made for.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where generation stops at the latest.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    top: Annotated[int, typer.Option(help="How many labels to print.")] = 5,
    adapter: Annotated[Path | None, typer.Option(help="An .onnx_adapter file to put into the model.")] = None,
) -> None:
    """Run an exported model in ONNX Runtime: continue a prompt, or classify texts and images.

    Labels are printed as JSON, a line for each text or image.
    """
    import json

    check_run(prompt, [*(text or ()), *(image or ())], image or (), task)
    from peftfx.serving.run import classify, stream

    with _quiet():
        if prompt is not None:
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
            stream(model, prompt, **options, adapter=adapter)  # type: ignore[arg-type]
            return
        for item in classify(model, [*(text or ()), *map(str, image or ())], task=task, top=top, adapter=adapter):
            print(json.dumps(item, default=float))


@app.command()
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other libraries' warnings and bars do not belong in this program's output; afterwards they speak again."""
    with contextlib.ExitStack() as undone:
        import logging as standard
        import warnings

        from tqdm import tqdm
        from transformers.utils import logging

        fake = standard.getLogger("torch._subclasses.fake_tensor")
        undone.callback(setattr, tqdm, "monitor_interval", tqdm.monitor_interval)
        undone.callback(setattr, standard, "raiseExceptions", standard.raiseExceptions)
        undone.callback(fake.setLevel, fake.level)
        undone.callback(logging.set_verbosity, logging.get_verbosity())
        undone.callback(
            logging.enable_progress_bar if logging.is_progress_bar_enabled() else logging.disable_progress_bar
        )
        undone.enter_context(warnings.catch_warnings())
        tqdm.monitor_interval = 0  # no thread for bars nobody sees: to start one with no memory left waits for ever
        standard.raiseExceptions = False  # what cannot be logged, with no memory left, is no traceback either
        fake.setLevel(standard.CRITICAL)  # of what it raises too
        warnings.filterwarnings("ignore")
        warnings.simplefilter("always", PeftfxWarning)
        warnings.showwarning = _show_warning
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line of its own, without the place in the code."""
    typer.echo(f"warning: {message}", err=True)


def _print_report(report: object, output: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from peftfx.export.checkpoint.merged_report import MergedReport
    from peftfx.export.report import Report

    assert isinstance(report, Report | MergedReport)
    table = Table(title=f"{report.model} -> {output}", show_header=False, title_justify="left")
    for name, text in report.rows():
        table.add_row(name, escape(text))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    """Run the command line.

    A PeftfxError is a message on stderr and its class's exit code: 2, or 1 for a failed verification. SIGTERM and
    SIGHUP end the command as an error does: what is half-written goes away, and the exit code is 128 and the signal's
    number.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages for large tensors, read when it is imported
    try:
        with orderly_end():
            app()
    except PeftfxError as error:
        print(f"peftfx: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "can't allocate memory" in str(error)):  # torch's words
            raise
        first = str(error).strip().partition("\n")[0] or "no more can be had"
        print(f"peftfx: error: out of memory: {first}\n  hint: free some; nothing was written", file=sys.stderr)
        sys.exit(PeftfxError.exit_code)
    except KeyboardInterrupt:
        print("peftfx: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except Terminated as end:
        print("peftfx: terminated; nothing was written", file=sys.stderr)
        sys.exit(128 + end.signal)
