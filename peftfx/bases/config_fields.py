"""Read transformers configs: fields that have several names, and special tokens."""

from __future__ import annotations

from collections.abc import Iterator


def collect_configs(config: object, seen: dict[int, object]) -> None:
    """Add a config and the configs of its parts to `seen`, by identity."""
    if config is None or id(config) in seen:
        return
    seen[id(config)] = config
    for name in getattr(config, "sub_configs", None) or ():
        collect_configs(getattr(config, name, None), seen)


def first_of(config: object, *names: str) -> object:
    """Return the value of the first of these fields that the config has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def number_of(config: object, name: str, default: int) -> int:
    """Return a field that is an integer, or the default."""
    value = first_of(config, name)
    return value if isinstance(value, int) else default


#: The fields that say how many tokens a model can hold. A model without such a field has no limit of its own.
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"),
    "max_target_positions",
)


def length_of(config: object) -> int | None:
    """Return the most tokens of the model of this config; None if the config does not say it."""
    get = getattr(config, "get_text_config", None)
    value = first_of(config if get is None else get(decoder=True), *_LENGTHS)
    return value if isinstance(value, int) and value > 0 else None


def vocabulary_of(config: object) -> object:
    """Return how many tokens a config tells; None if it tells none."""
    text = getattr(config, "get_text_config", lambda: config)()
    return getattr(text, "vocab_size", None)


def special_tokens(config: object) -> Iterator[int]:
    """Yield the tokens for which the config, or one of its parts, has a field, or a second name of a field."""
    seen: dict[int, object] = {}
    collect_configs(config, seen)
    for part in seen.values():
        for name in {*dir(part), *(getattr(part, "attribute_map", None) or ())}:
            if name.endswith(("_token_id", "_token_index")):
                value = getattr(part, name, None)
                yield from [i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)]
