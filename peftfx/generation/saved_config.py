"""Read how a served model generates."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

from peftfx.bases.transformers_config import understanding
from peftfx.errors import warn
from peftfx.files import is_file, read_json


def saved_config(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Read the `generation_config.json` in a directory; without the file, what the model's config says of generation.

    A kind of cache in the file is ignored, with a warning: the cache of a served model is that of its graphs. So are
    outputs that graphs do not give: hidden states and attentions, which a config may ask for in every call.

    Raises:
        PeftfxError: the file is no JSON, or transformers cannot read it.
    """
    path = directory / "generation_config.json"
    if not is_file(path):
        return _of_graphs(GenerationConfig.from_model_config(config), "config.json")
    read_json(path, "copy the base model's again")
    with understanding(path, "cannot read how the model generates"):
        made = GenerationConfig.from_pretrained(directory, local_files_only=True)
    if made.cache_implementation not in (None, "dynamic", "hybrid"):  # transformers itself ignores "hybrid"
        kind, made.cache_implementation = made.cache_implementation, None
        warn(f"{path.name} asks for a cache of the kind {kind!r}: it is ignored, as the graphs have their own")
    return _of_graphs(made, path.name)


def _of_graphs(made: GenerationConfig, file: str) -> GenerationConfig:
    """Take out of a config, read from this file, the outputs that graphs do not give."""
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(made, name):
            setattr(made, name, False)
            warn(f"{file} asks for {name}: it is ignored, as the graphs give logits alone")
    return made
