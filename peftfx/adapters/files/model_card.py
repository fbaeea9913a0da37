"""The model card of a saved adapter: a README.md like HF PEFT's, written if the directory has none."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.names import name_of_base
from peftfx.files import is_file, write_file

CARD = "README.md"


def write_card(directory: Path, base: nn.Module, adapter: Adapter) -> None:
    """Write a model card that says what the adapter is for, unless `directory` has a README.md already."""
    path = directory / CARD
    if not is_file(path):
        text = _card(base, adapter)
        write_file(path, lambda target: target.write_text(text, encoding="utf-8"))


def _card(base: nn.Module, adapter: Adapter) -> str:
    name = adapter.records.get("base_model_name_or_path") or name_of_base(base)
    methods = sorted({rule.peft_type.lower() for rule in adapter.rules})
    tags = sorted({*methods, *([f"base_model:adapter:{name}"] if name else []), *_given_tags(base)})
    head = {"base_model": name or None, "library_name": "peft", "tags": tags}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value is not None]
    what = f"An adapter ({', '.join(methods)}) for {f'`{name}`' if name else 'a base model'}, in HF PEFT's format."
    return "\n".join(["---", *lines, "---", "", what, ""])


def _given_tags(base: nn.Module) -> list[str]:
    """Return the tags that `add_model_tags` set."""
    return [str(tag) for tag in getattr(base, "model_tags", None) or ()]
