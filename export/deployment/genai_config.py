"""Write `genai_config.json`, which ONNX Runtime GenAI reads to run a model in its decode view."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftfx.bases.config_fields import length_of
from peftfx.views.decode import PAST, PRESENT, Decode

GENAI_CONFIG = "genai_config.json"
_UNLIMITED = 2048


def write_genai_config(directory: Path, config: Any, view: Decode, ahead: int = 0) -> str:
    """Write `genai_config.json` into a directory, if GenAI can run the model. Return why it was not written, or "".

    GenAI cannot run a model whose layers differ in their heads, or whose keys and values differ in width: its config
    has one number for all. Nor can it run a model with a layer that keeps states: GenAI knows states only for a few
    named architectures. GenAI pads a batch on the right, and recognises padding by `pad_token_id`.

    Args:
        directory: the directory that has `model.onnx` in the decode view.
        config: the model's transformers config.
        view: the decode view.
        ahead: the number of virtual tokens inside the graph, which reduce the tokens that the model can hold.
    """
    layers = set(view.layers)
    if any(not layer.attends for layer in layers):
        return "a layer keeps states, which GenAI knows only for some architectures"
    if len(layers) != 1 or any(layer.key != layer.value for layer in layers):
        return "the heads of its layers, or the widths of keys and values, differ, and GenAI has one number for all"
    (layer,) = layers
    text = config.get_text_config(decoder=True)
    length = context_length(text) - ahead
    made = {
        "model": {
            "type": "decoder",  # any type will do: what a named type adds is in the graph
            "vocab_size": text.vocab_size,
            "context_length": length,
            **_tokens(config, text),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "head_size": layer.key,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": layer.heads,
                "num_hidden_layers": len(view.layers),
                "inputs": {
                    **{name: name for name in view.axes if not name.startswith(f"{PAST}.")},
                    "past_key_names": f"{PAST}.%d.key",
                    "past_value_names": f"{PAST}.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}.%d.key",
                    "present_value_names": f"{PRESENT}.%d.value",
                },
            },
        },
        "search": {
            "max_length": length,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
    (directory / GENAI_CONFIG).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return ""


def context_length(config: Any) -> int:
    """Return how many tokens a model can hold, by its `config`."""
    return length_of(config) or _UNLIMITED


def _tokens(config: Any, text: Any) -> dict[str, object]:
    """Return the ids of special tokens. If there is no padding token, the end token is used for it."""
    found = {
        name: next((v for c in (config, text) if (v := getattr(c, name, None)) is not None), None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    end = found["eos_token_id"]
    if found["pad_token_id"] is None:
        found["pad_token_id"] = end[0] if isinstance(end, list) and end else end
    return {name: value for name, value in found.items() if value is not None}
