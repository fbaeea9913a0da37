"""Run text prompts: a model that generates streams a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from peftfx.errors import PeftfxError, warn
from peftfx.serving.generators import ServedSeq2Seq
from peftfx.serving.load import load
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.streaming import generation_options, streamer_to
from peftfx.views.encoder_decoder import TEXT_INPUT


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Continue the prompt, writing each word to `out` as it is generated. Then yield the whole continuation.

    Raises:
        PeftfxError: the model cannot generate, or its directory has no tokenizer or chat template.
    """
    from transformers import GenerationMixin

    model = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if not isinstance(model, GenerationMixin):
        hint = "pass --text or --image to classify, or export it with --view decode"
        raise PeftfxError("this model has no cache, so it cannot generate", str(asked.directory), hint)
    if isinstance(model, ServedSeq2Seq) and model.main_input_name != TEXT_INPUT:
        hint = "pass --image FILE" if "pixel" in model.main_input_name else "pass --audio FILE.wav"
        raise PeftfxError(f"this model reads {model.main_input_name}, not a text", str(asked.directory), hint)
    assert asked.prompt is not None
    tokenizer = model.tokenizer
    inputs = _encode(tokenizer, asked.prompt, asked.chat, asked.directory)
    if not inputs["input_ids"].shape[1]:
        raise PeftfxError("the prompt has no tokens, and the model continues one", "--prompt", "give a text")
    options = generation_options(asked, most=128) | {"pad_token_id": tokenizer.pad_token_id}
    tokens: Any = model.generate(**inputs, **options, streamer=streamer_to(out, tokenizer))
    _tell_length(model.config, tokens.shape[1])
    new = tokens[0, inputs["input_ids"].shape[1] if model.pads_left else 1 :]  # a decoder begins with a start token
    yield Found({"prompt": asked.prompt, "text": str(tokenizer.decode(new, skip_special_tokens=True))}, words="")


def _tell_length(config: Any, length: int) -> None:
    """Warn of a text that is longer than what the model's config tells."""
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        warn(f"the text has {length} tokens, and the model's config tells {most}: what comes after them may be poor")


def _encode(tokenizer: Any, prompt: str, chat: bool, directory: Path) -> dict[str, torch.Tensor]:
    if not chat:
        made = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    if not tokenizer.chat_template:
        raise PeftfxError("the tokenizer has no chat template", str(directory), "leave --chat out")
    said = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
