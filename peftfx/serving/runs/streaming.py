"""Sample text and write each word as it is generated, for all runs that generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor

from peftfx.bases.config_fields import length_of
from peftfx.errors import PeftfxError, first_line
from peftfx.serving.runs.asked import Asked

_MOST = 128  #: new tokens, where neither the user nor the model's configs tell fewer


def room(model: Any, before: int) -> int:
    """Return the most new tokens after this many, if the user gives no number: as many as the model's configs allow."""
    own = model.generation_config
    whole = (length_of(model.config), own.max_length if own.max_new_tokens is None else None)
    left = [most - before for most in whole if most is not None and most > before]
    return min(own.max_new_tokens or _MOST, _MOST, *left)


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


@dataclass(frozen=True)
class Writer:
    """Generates texts, and writes each word of a text to a file as it comes.

    transformers cannot write words as they come if there are several texts to choose from, as beams are.

    Attributes:
        model: a served model that generates.
        tokenizer: its tokenizer.
        out: the file; None writes nothing.
    """

    model: Any
    tokenizer: Any
    out: TextIO | None

    @property
    def streams(self) -> bool:
        """Whether words are written as they come."""
        own = self.model.generation_config
        several = (own.num_beams or 1) > 1 or (own.num_return_sequences or 1) > 1 or own.force_words_ids is not None
        return self.out is not None and not several

    def follow(self, asked: Asked, inputs: Mapping[str, Tensor]) -> tuple[str, int]:
        """Generate what follows a prompt. Return the text, and how many tokens were made and given in all.

        Args:
            asked: what the user asks for.
            inputs: the prompt's tokens and mask, and what is beside them.
        """
        own = self.tokenizer
        before = inputs["input_ids"].shape[1] if self.model.pads_left else 1  # a decoder begins with a start token
        pad = own.eos_token_id if own.pad_token_id is None else own.pad_token_id
        options = generation_options(asked, room(self.model, before)) | {"pad_token_id": pad}
        tokens = self.generate(**inputs, **options)
        return str(own.decode(tokens[0, before:], skip_special_tokens=True)), tokens.shape[1]

    def generate(self, *args: Any, **options: Any) -> Tensor:
        """Generate the tokens of a text by the model's `generate`, alone also where the config asks for more.

        Raises:
            PeftfxError: transformers cannot generate as the model's generation config tells.
        """
        if self.streams:
            options["streamer"] = _streamer_to(self.out, self.tokenizer)
        if self.model.generation_config.stop_strings is not None or self.model.generation_config.token_healing:
            options["tokenizer"] = self.tokenizer
        try:
            made: Tensor = self.model.generate(*args, **options, return_dict_in_generate=False)
        except ValueError as error:  # what transformers' own checks raise
            what = f"transformers cannot generate with this generation config: {first_line(error)}"
            where = str(self.model.directory / "generation_config.json")
            raise PeftfxError(what, where, "change the file, or pass --verbose to see the cause") from error
        return made

    def words(self, text: str) -> str:
        """Return what is still to be written of a text."""
        return "" if self.streams else text


def _streamer_to(out: TextIO | None, tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Writes(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", flush=True, file=out)

    return Writes(tokenizer, skip_prompt=True, skip_special_tokens=True)
