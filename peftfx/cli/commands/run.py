"""The command `peftfx run`: run an exported model in ONNX Runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.speech import quiet
from peftfx.cli.voice import VOICE
from peftfx.cli.words import task_choice
from peftfx.errors import PeftfxError
from peftfx.serving.runs.asked import Asked, Found, read_texts, runner


def run(
    model: Annotated[Path, typer.Argument(help="Directory that `peftfx export` wrote.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue, one in a run; the answer is streamed.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text for the model's task; a model that generates continues it. Repeat it for more."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="File of texts, one a line; empty lines are left out; - is the standard input."),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Query to compare each text with, or question to answer by each text.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image for the model's task; repeat it for more.")] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with the frames of a video for the prompt, as images; repeat it for more."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(help="WAV file to transcribe, classify or ask about, of any sampling rate; repeat it for more."),
    ] = None,
    task: Annotated[str | None, task_choice("what the model was made for")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most new tokens; by default 128 after a prompt, or fewer if the configs say so.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Temperature of sampling; 0 always takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    language: Annotated[
        str | None, typer.Option(help="With --audio: the spoken language, if the model needs it.")
    ] = None,
    translate: Annotated[
        bool, typer.Option("--translate", help="With --audio: translate to English, if the model can.")
    ] = False,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="With --audio: print the times of each piece, if the model can.")
    ] = False,
    top: Annotated[int | None, typer.Option(help="How many labels to print; by default 5.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An .onnx_adapter file to put into the model; or a name, if it is batched.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Name of the model's prompt for texts that are embedded.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="PNG file for segments; each pixel is the number of its class.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help=".npy file for embeddings; without it they are printed.")] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Where ONNX Runtime computes: cuda, directml, openvino; repeat it for the next choice."),
    ] = None,
) -> None:
    """Run an exported model in ONNX Runtime: continue, classify, embed or rank texts, label images, transcribe speech.

    Labels and embeddings are printed as JSON, a line for each text or image. With a query, texts are printed the best
    first.
    """
    if prompt and len(prompt) > 1:
        what = f"--prompt is given {len(prompt)} times, and a run continues one text"
        raise PeftfxError(what, "--prompt", "run it once for each text; in Python, generate() takes several")
    asked = Asked(
        directory=model,
        prompt=prompt[0] if prompt else None,
        texts=(*(text or ()), *read_texts(texts)),
        images=tuple(image or ()),
        videos=tuple(video or ()),
        sounds=tuple(audio or ()),
        task=task,
        top=top,
        adapter=adapter,
        providers=tuple(provider or ()),
        query=query,
        prompt_name=prompt_name,
        save=save,
        output=output,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        language=language,
        translate=translate,
        timestamps=timestamps,
    )
    asked.check()
    with quiet():
        out = None if VOICE.as_json or VOICE.quiet else sys.stdout
        for found in runner(asked)(asked, out):
            _tell(found)


def _tell(found: Found) -> None:
    """Print a result: as a line of JSON if asked for or if it has no words, otherwise as words."""
    if VOICE.as_json or (found.words is None and not VOICE.quiet):
        print(json.dumps(found.value, default=float), flush=True)
    elif found.words and not VOICE.quiet:
        print(found.words, flush=True)
