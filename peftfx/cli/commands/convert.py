"""The command `peftfx convert`: turn an adapter, a difference of checkpoints or a single file into a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.speech import quiet
from peftfx.cli.voice import tell
from peftfx.cli.words import Download, choice, found_base
from peftfx.errors import PeftfxError


def convert(
    base: Annotated[Path, typer.Option(help="Directory of the base model (transformers, or diffusers), or org/name.")],
    output: Annotated[Path, typer.Option(help="Directory to create; with --to kohya or diffusers, a file.")],
    adapter: Annotated[Path | None, typer.Option(help="HF PEFT directory, of any method that acts on weights.")] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="Directory of another checkpoint, whose difference from the base becomes a LoRA."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A LoRA, DoRA, LoHa or LoKr of one file, of any trainer.")] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the LoRA, as 16, or the share of the energy that it keeps, as 0.95. Only a LoRA needs none."
        ),
    ] = None,
    to: Annotated[str, choice(("peft", "kohya", "diffusers"), "Whose format the LoRA has.")] = "peft",
    prefix: Annotated[
        str | None,
        typer.Option(
            help="With --to: what the keys of the file begin with; by default lora_unet for kohya, unet for diffusers."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the adapter at the output; other files there stay.")
    ] = False,
    download: Download = False,
) -> None:
    """Write an adapter, the difference of two checkpoints or a single file as a LoRA. Exit codes: those of `export`."""
    from peftfx.export.convert_command import convert_directory

    with quiet():
        made = convert_directory(
            found_base(base, download=download),
            output,
            adapter=adapter,
            tuned=tuned,
            file=file,
            rank=_rank(rank),
            to=to,
            prefix=prefix,
            force=force,
        )
    tell({"output": str(output), "made": made}, made)


def _rank(text: str | None) -> float | None:
    """Read a rank: a whole number is a rank, any other number is a share of the energy."""
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        hint = "pass a rank, as in --rank 16, or a share of the energy, as in --rank 0.95"
        raise PeftfxError(f"the rank is not a number: {text!r}", "rank", hint) from error
