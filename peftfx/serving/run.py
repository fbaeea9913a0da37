"""What `peftfx run` does: text streams out of a model that generates, labels out of one that classifies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from peftfx.bases.tasks import HEARING, resolve_task
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.load import load
from peftfx.serving.pipelines import pipeline, task_of_directory


def stream(
    directory: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    chat: bool = False,
    adapter: Path | None = None,
    out: TextIO | None = None,
) -> str:
    """Continue a prompt, writing each word to `out` as it comes; returns the whole continuation.

    Args:
        directory: an exported model that generates.
        prompt: the text.
        max_new_tokens: where to stop, if the model does not stop first.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
        chat: put the prompt into the tokenizer's chat template, as what a user says.
        adapter: an `.onnx_adapter` file to put into the model.
        out: by default the standard output.

    Raises:
        PeftfxError: the model generates nothing, or its directory has no tokenizer or chat template.
    """
    from transformers import GenerationMixin, TextStreamer

    model = load(directory, adapter=adapter)
    if not isinstance(model, GenerationMixin):
        hint = "pass --text or --image to classify, or export it with --view decode"
        raise PeftfxError("this model has no cache to generate with", str(directory), hint)

    class Writes(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", flush=True, file=out or sys.stdout)

    tokenizer = model.tokenizer
    inputs = _encode(tokenizer, prompt, chat, directory)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if seed is not None:
        torch.manual_seed(seed)
    writes = Writes(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(**inputs, **options, streamer=writes, pad_token_id=tokenizer.pad_token_id)
    new = tokens[0, inputs["input_ids"].shape[1] if model.pads_left else 1 :]  # a decoder has a start of its own
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _encode(tokenizer: Any, prompt: str, chat: bool, directory: Path) -> dict[str, torch.Tensor]:
    if not chat:
        made = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    if not tokenizer.chat_template:
        raise PeftfxError("the tokenizer has no chat template", str(directory), "leave --chat out")
    said = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def classify(
    directory: Path, inputs: Sequence[str], *, task: str | None = None, top: int = 5, adapter: Path | None = None
) -> Iterator[Any]:
    """What transformers' pipeline for the model's task gives for each text or image, the likeliest labels first.

    Raises:
        PeftfxError: the model is for something else, or lacks a tokenizer or image processor.
    """
    served = load(directory, adapter=adapter)
    task = task_of_directory(served.directory) if task is None else resolve_task(task)
    if task in HEARING:
        hint = "call the model in Python (peftfx.runtime.load) with the features of the sound"
        raise PeftfxError("this model takes sound, and the command line gives texts and images alone", task, hint)
    run = pipeline(served, task)
    options = {"top_k": top} if run.task in ("text-classification", "image-classification") else {}
    for item in inputs:
        with understanding(item, f"the {run.task} pipeline does not take this", "see `__cause__`"):
            found = run(item, **options)
        yield found
