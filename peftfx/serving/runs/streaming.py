"""Sample text and write each word as it is generated, for all runs that generate."""

from __future__ import annotations

from typing import Any, TextIO

import torch

from peftfx.serving.runs.asked import Asked


def generation_options(asked: Asked, most: int | None = None) -> dict[str, Any]:
    """Return the options for transformers' `generate`. If a seed is given, set torch's seed.

    Args:
        asked: what the user asks for.
        most: the most new tokens if the user gives no number; None leaves it to the model's generation config.
    """
    options: dict[str, Any] = {"do_sample": asked.temperature > 0}
    most = most if asked.max_new_tokens is None else asked.max_new_tokens
    if most is not None:
        options["max_new_tokens"] = most
    if asked.temperature > 0:
        options["temperature"] = asked.temperature
    if asked.seed is not None:
        torch.manual_seed(asked.seed)
    return options


def streamer_to(out: TextIO | None, tokenizer: Any) -> Any:
    """Return a streamer that writes the text after the prompt to a file; None without a file."""
    from transformers import TextStreamer

    if out is None:
        return None

    class Writes(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", flush=True, file=out)

    return Writes(tokenizer, skip_prompt=True, skip_special_tokens=True)
