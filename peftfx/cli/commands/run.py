"""`peftfx run`: an exported model in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.speech import quiet
from peftfx.cli.voice import VOICE, tell
from peftfx.cli.words import check_run


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
    import contextlib
    import io
    import json

    check_run(prompt, [*(text or ()), *(image or ())], image or (), task)
    from peftfx.serving.run import classify, stream

    with quiet():
        if prompt is not None:
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
            if not (VOICE.as_json or VOICE.quiet):
                stream(model, prompt, **options, adapter=adapter)  # type: ignore[arg-type]
                return
            with contextlib.redirect_stdout(io.StringIO()) as said:
                stream(model, prompt, **options, adapter=adapter)  # type: ignore[arg-type]
            tell({"prompt": prompt, "text": said.getvalue()})
            return
        for item in classify(model, [*(text or ()), *map(str, image or ())], task=task, top=top, adapter=adapter):
            if not VOICE.quiet:
                print(json.dumps(item, default=float))
