"""Passages of Python's language reference, as tokens: real text that every Python installation has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftfx.demo.topics import TOPICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Passages:
    """Windows of text, int64[windows, length]; none that is held out overlaps one to train on."""

    train: Tensor
    held_out: Tensor


def load_passages(tokenizer: PreTrainedTokenizerBase, length: int = 128, *, seed: int = 0) -> Passages:
    """The topics of `peftfx.demo.topics`, markup and all: the end of each is held out, a quarter of its windows.

    A paragraph that comes again, in any topic, is left out there: none would be held out that was trained on.

    Args:
        tokenizer: of the model.
        length: of a window, in tokens.
        seed: of the order.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in TOPICS.values():
        text = "\n\n".join(_new(topics[name], seen))
        tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        windows = tokens[: len(tokens) // length * length].view(-1, length)
        cut = len(windows) - len(windows) // 4
        for part, own in zip(parts, (windows[:cut], windows[cut:]), strict=True):
            part.append(own)
    random = torch.Generator().manual_seed(seed)
    shuffled = [torch.cat(part)[torch.randperm(sum(map(len, part)), generator=random)] for part in parts]
    return Passages(*shuffled)


def _new(text: str, seen: set[str]) -> Iterator[str]:
    """The paragraphs of a text that were not seen before."""
    for paragraph in text.split("\n\n"):
        if (plain := " ".join(paragraph.lower().split())) not in seen:
            seen.add(plain)
            yield paragraph
