"""Copy what a server needs beside the weights, from a base or an adapter: tokenizer, processor and config files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from transformers.exporters.base import EXPORT_MANIFEST_FILE

from peftfx.bases.processors.writers import writer_of
from peftfx.export.deployment import genai_config

_ENDINGS = frozenset({".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".tiktoken", ".vocab"})
_NOT = (
    ".",
    "adapter_",
    "readme",
    "peftfx_",
    "quantize_config",
    "quant_config",
    genai_config.GENAI_CONFIG,
    EXPORT_MANIFEST_FILE,
)
"""Lower-case prefixes of file names that are never copied. Some of these files describe one export and hold for that
export only."""


def copy_assets(source: Path, target: Path, *leave: str) -> list[Path]:
    """Copy config, tokenizer and processor files, not weights or adapters. Files that the target already has stay.

    Args:
        source: the directory to copy from.
        target: the directory to copy to.
        leave: names of further files that are not copied.

    Returns:
        The symbolic links that were not followed, because they lead out of the source. Links inside Hugging Face's
        cache, from `snapshots/REVISION` to `blobs`, are followed.
    """
    left_out = []
    for path in (source / name for name in assets_of(source, *leave)):
        if os.path.lexists(target / path.name):
            continue
        if _leaves(path, source):
            left_out.append(path)
        else:
            shutil.copyfile(path, target / path.name)
    return left_out


def tell_links(links: Sequence[Path], say: Callable[[str], object]) -> None:
    """Say which symbolic links `copy_assets` did not follow."""
    if links:
        say(f"not copied, links that leave their directory: {', '.join(map(str, links))}")


def assets_of(source: Path, *leave: str) -> list[str]:
    """Return the names of the files in the directory `source` that a server needs, except the names in `leave`."""

    def wanted(path: Path) -> bool:
        name = path.name.lower()
        unwanted = name.startswith(_NOT) or name.endswith(".index.json") or path.name in leave
        return not unwanted and path.suffix in _ENDINGS and path.is_file()

    return [path.name for path in sorted(source.iterdir()) if wanted(path)]


def write_configs(base: nn.Module, directory: Path) -> None:
    """Write the model's current config, for example with an adapter's labels, and its generation config."""
    write = getattr(getattr(base, "config", None), "to_json_file", None)
    if write is not None:
        write(directory / "config.json")
    generation = getattr(writer_of(base), "generation_config", None)
    if generation is not None and base.can_generate():  # type: ignore[operator]
        generation.to_json_file(directory / "generation_config.json")


def _leaves(path: Path, source: Path) -> bool:
    """Say whether a path leads out of the source directory."""
    home, real = source.resolve(), path.resolve()
    cached = home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")
    return not (real.is_relative_to(home) or cached)
