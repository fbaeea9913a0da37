"""The table by which HF PEFT embeds the text under a soft prompt. It is not always the one that the model reads."""

from __future__ import annotations

from torch import nn

from peftfx.bases.config_fields import vocabulary_of
from peftfx.bases.guests import own_modules, own_parameters

_NAMED = "embeddings.word_embeddings"  #: where HF PEFT looks first, as in BERT


def text_table(base: nn.Module) -> str | None:
    """Return the path of the module that HF PEFT takes for the embeddings of the text; None if it finds none.

    It takes the first parameter with as many rows as the vocabulary, within the first child that is a model of
    transformers if there is one.
    """
    if any(path == _NAMED for path, _ in own_modules(base, remove_duplicate=False)):
        return _NAMED
    models = (name for name, child in base.named_children() if hasattr(child, "main_input_name"))
    within = "".join(f"{name}." for name in [*models][:1])
    rows = vocabulary_of(getattr(base, "config", None))
    inside = ((name, p) for name, p in own_parameters(base, remove_duplicate=False) if name.startswith(within))
    path, _, leaf = next((name for name, p in inside if p.shape[:1] == (rows,)), "").rpartition(".")
    return path if leaf == "weight" else None
