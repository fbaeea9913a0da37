"""Run text prompts: a model that generates streams a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

import torch

from peftfx.bases.chats import filled_template
from peftfx.errors import PeftfxError, warn
from peftfx.serving.generators import ServedSeq2Seq
from peftfx.serving.load import load
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import WRITING, refuse_idle, refuse_task_of_prompt
from peftfx.serving.runs.streaming import Writer
from peftfx.serving.served import Served
from peftfx.views.encoder_decoder import TEXT_INPUT


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Continue the prompt, writing each word to `out` as it is generated. Then yield the whole continuation.

    Raises:
        PeftfxError: the model cannot generate, its directory has no tokenizer or chat template, or an option does not
            fit.
    """
    refuse_task_of_prompt(asked)
    model = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    assert asked.prompt is not None
    yield from continued(model, asked, asked.prompt, out)


def continued(model: Served, asked: Asked, prompt: str, out: TextIO | None) -> Iterator[Found]:
    """Continue a prompt, as `run` does.

    Raises:
        PeftfxError: as in `run`.
    """
    from transformers import GenerationMixin

    refuse_idle(asked, "continues a text", *WRITING, "chat")
    if not isinstance(model, GenerationMixin):
        hint = "pass --text or --image to classify, or export it with --view decode"
        hint = "export it with --view decode, and pass --prompt" if asked.texts else hint
        raise PeftfxError("this model has no cache, so it cannot generate", str(asked.directory), hint)
    if isinstance(model, ServedSeq2Seq) and model.main_input_name != TEXT_INPUT:
        hint = "pass --image FILE" if "pixel" in model.main_input_name else "pass --audio FILE.wav"
        raise PeftfxError(f"this model reads {model.main_input_name}, not a text", str(asked.directory), hint)
    tokenizer = model.tokenizer
    inputs = _encode(tokenizer, asked, prompt)
    if not inputs["input_ids"].shape[1]:
        flag = "--text" if asked.texts else "--prompt"
        raise PeftfxError("the prompt has no tokens, and the model continues one", flag, "give a text")
    writer = Writer(model, tokenizer, out)
    text, length = writer.follow(asked, inputs)
    _tell_length(model.config, length)
    yield Found({"prompt": prompt, "text": text}, writer.words(text))


def _tell_length(config: Any, length: int) -> None:
    """Warn of a text that is longer than what the model's config tells."""
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        warn(f"the text has {length} tokens, and the model's config tells {most}: what comes after them may be poor")


def _encode(tokenizer: Any, asked: Asked, prompt: str) -> dict[str, torch.Tensor]:
    if not asked.chat:
        made = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    said = [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    made = filled_template(tokenizer, said, str(asked.directory), "leave --chat out", **options)
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
