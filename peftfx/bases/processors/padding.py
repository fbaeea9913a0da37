"""The token that pads texts, for classifiers whose config does not name it, or names another.

A classifier over a decoder reads a text at its last token, and finds this by the padding. The configs of most decoders
name no padding token; the tokenizer of a trained adapter, or that of its base, does. An adapter's tokenizer may have a
new padding token: while it trains, transformers' Trainer puts that into the config, which an adapter's files have not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from peftfx.bases.tasks import is_decoder_type, task_of
from peftfx.errors import warn
from peftfx.files import is_file

_FILE, _FIELD, _CLASSIFYING = "tokenizer_config.json", "pad_token_id", "text-classification"


def padding_of(tokenizer: Any) -> int | None:
    """Return the id by which a tokenizer pads: its padding token, or else the token that ends a text."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


def lacks_padding(model: nn.Module) -> bool:
    """Say whether a model classifies texts, and its config names no padding token."""
    config = getattr(model, "config", None)
    return task_of(model) == _CLASSIFYING and getattr(config, _FIELD, None) is None


def settle_padding(model: nn.Module, beside: Iterable[Path], directory: Path) -> None:
    """Name in a classifier's config the token by which its texts are padded.

    Args:
        model: the model.
        beside: the directories of adapters, whose tokenizers come before the base's. If they have another padding token
            than the config of a classifier over a decoder names, it is theirs, and a warning tells so.
        directory: the base's. Its tokenizer counts if the config names no padding token.
    """
    config = getattr(model, "config", None)
    if lacks_padding(model):
        _fill(config, (*beside, directory), padding_of)
    elif task_of(model) == _CLASSIFYING and is_decoder_type(getattr(config, "model_type", None)):
        named = getattr(config, _FIELD)
        _fill(config, beside, lambda tokenizer: tokenizer.pad_token_id)
        if (found := getattr(config, _FIELD)) != named:
            other = f"the base's config names {named}: the adapter's is taken"
            warn(f"the adapter's tokenizer pads texts with token {found}, and {other}")


def _fill(config: object, directories: Iterable[Path], padding: Callable[[Any], int | None]) -> None:
    """Name in a config the padding token of the first directory with a tokenizer that has one."""
    from transformers import AutoTokenizer

    for directory in directories:
        if not is_file(directory / _FILE):
            continue
        try:
            read = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):  # a model needs no tokenizer to be loaded
            continue
        if (found := padding(read)) is not None:
            setattr(config, _FIELD, found)
            return
