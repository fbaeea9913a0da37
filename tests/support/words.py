"""Tokenizers of whole words, and pictures: what prompts of tiny models are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from PIL import Image


def word_tokenizer(
    words: Iterable[str] | Mapping[str, int], special: Iterable[str] = (), **names: Any
) -> hf.PreTrainedTokenizerFast:
    """A tokenizer for which each word between spaces is a token.

    Args:
        words: the words, in the order of their tokens or with their tokens.
        special: those that are found within a word too.
        names: which words are what, such as `unk_token`, and other options of the tokenizer.
    """
    table = dict(words) if isinstance(words, Mapping) else {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token=names["unk_token"]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(special))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def picture(path: Path, seed: int, size: tuple[int, int] = (70, 50)) -> Path:
    """Write a random picture of this width and height."""
    pixels = torch.randint(256, (5, 7, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize(size).save(path)
    return path
