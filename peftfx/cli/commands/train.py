"""The command `peftfx train`: train an adapter from a base, rules and a file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.garbage import kept_to_the_end
from peftfx.cli.speech import quiet
from peftfx.cli.voice import tell
from peftfx.cli.words import Download, found_base


def train(
    base: Annotated[
        Path, typer.Option(help="Directory of the base model, with its tokenizer; or org/name, or a GGUF file.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="File of JSON lines: text; prompt and completion; messages (a chat); or text and label (classes)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory to create for the adapter; it appears when it is complete.")],
    rules: Annotated[
        str, typer.Option(help="What is trained, as 'lora(r=8)@attention'; see `peftfx methods`.")
    ] = "lora(r=8)@attention",
    evaluate: Annotated[Path | None, typer.Option(help="File of rows to evaluate on; their loss is reported.")] = None,
    epochs: Annotated[float, typer.Option(help="How many times each row is used.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer, in place of epochs; -1 goes by epochs.")] = -1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW; it falls linearly to 0.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Rows in one step.")] = 8,
    max_length: Annotated[int, typer.Option(help="The most tokens of a row; the rest is cut off.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the initial values, the order of rows and dropout.")] = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints; 0 keeps none.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output directory if it exists.")] = False,
    download: Download = False,
) -> None:
    """Train an adapter on a file of rows by transformers' Trainer, and write it in HF PEFT's format.

    The losses and a plot of them are in OUTPUT/training. Exit codes: 0 done; 2 bad input.
    """
    with kept_to_the_end():
        from peftfx.cli.progress import Progress
        from peftfx.training.options import TrainOptions
        from peftfx.training.train import train as run

    asked = TrainOptions(
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        evaluate=evaluate,
        resume=resume,
        save_steps=save_steps,
        force=force,
    )
    with quiet(), Progress() as progress:
        made = run(found_base(base, download=download), data, rules, output, asked, progress.stage)
    tell(made)
