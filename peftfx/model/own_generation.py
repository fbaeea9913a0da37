"""Calls of `generate` that the base's own modules run, and no graph: what they ask for, and how many rows they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError

NAMES = "adapter_names"  #: the argument of a call that has an adapter's name for each row
_OUTPUTS = ("output_attentions", "output_hidden_states")
_BEYOND = (NAMES, "inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "decoder_attention_mask")


def is_beyond_graphs(kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `generate` asks for what only the base's own modules do."""
    asked = any(kwargs.get(name) is not None for name in _BEYOND)
    asked = asked or _asked(kwargs, "cache_implementation", None) not in (None, "dynamic")
    return asked or any(_asked(kwargs, name, False) for name in _OUTPUTS)


def refuse_names(kwargs: Mapping[str, Any]) -> None:
    """Refuse adapters' names for rows in a call that a graph runs.

    Raises:
        PeftfxError: the call gives such names.
    """
    if kwargs.get(NAMES) is not None:
        what = "rows choose among adapters only where the base's own modules run all of them"
        raise PeftfxError(what, NAMES, "generate for the rows of each adapter by themselves, or export(batched=...)")


def rows_of_each(base: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Return for how many rows each row of a prompt stands in a call of `generate`: beams, or several texts.

    Raises:
        PeftfxError: it is more than one, and the base encodes a source, which has each row once.
    """
    own = getattr(base, "generation_config", None)
    counts = (_asked(kwargs, n, getattr(own, n, None)) for n in ("num_beams", "num_return_sequences"))
    most = max(1, *(count or 1 for count in counts))
    if most > 1 and encodes_and_decodes(base):
        what = "rows choose among adapters in the source and in the text, which has more rows"
        raise PeftfxError(what, NAMES, "generate with num_beams=1 and num_return_sequences=1, or one adapter at a time")
    return most


def _asked(kwargs: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return an option of a call of `generate`, which may be in its `generation_config`."""
    found = kwargs.get(name)
    found = getattr(kwargs.get("generation_config"), name, None) if found is None else found
    return default if found is None else found
