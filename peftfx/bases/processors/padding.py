"""The token that pads texts, for classifiers whose config does not name it.

A classifier over a decoder reads a text at its last token, and finds this by the padding. The configs of most decoders
name no padding token; the tokenizer of a trained adapter, or that of its base, does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from peftfx.bases.tasks import task_of
from peftfx.files import is_file

_FILE, _FIELD = "tokenizer_config.json", "pad_token_id"


def padding_of(tokenizer: Any) -> int | None:
    """Return the id by which a tokenizer pads: its padding token, or else the token that ends a text."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


def lacks_padding(model: nn.Module) -> bool:
    """Say whether a model classifies texts, and its config names no padding token."""
    config = getattr(model, "config", None)
    return task_of(model) == "text-classification" and getattr(config, _FIELD, None) is None


def fill_padding(model: nn.Module, directories: Iterable[Path]) -> None:
    """Name the padding token in a model's config: that of the first directory with a tokenizer.

    Args:
        model: a model whose config names none.
        directories: those of adapters and of the base.
    """
    from transformers import AutoTokenizer

    for directory in directories:
        if not is_file(directory / _FILE):
            continue
        try:
            read = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):  # a model needs no tokenizer to be loaded
            continue
        if (found := padding_of(read)) is not None:
            setattr(model.config, _FIELD, found)
            return
