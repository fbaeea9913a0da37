"""Passages of Python's language reference as tokens: real text that every Python installation has."""

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
    """Windows of text, int64[windows, length]. No held-out window overlaps a training window."""

    train: Tensor
    held_out: Tensor


def load_passages(tokenizer: PreTrainedTokenizerBase, length: int = 128, *, seed: int = 0) -> Passages:
    """Load the topics of `peftfx.demo.topics`, with markup. The last quarter of each topic is held out.

    A repeated paragraph is left out, so that no held-out text is also trained on.

    Args:
        tokenizer: the model's tokenizer.
        length: the length of a window, in tokens.
        seed: the seed of the order.
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
    """Yield the paragraphs of a text that were not seen before."""
    for paragraph in text.split("\n\n"):
        if (plain := " ".join(paragraph.lower().split())) not in seen:
            seen.add(plain)
            yield paragraph
