"""Formats: the version that each file of peftfx's own carries; `docs/formats.md` has what is in them.

A file of an older version is read, one of a newer version is refused: what is new in it would be lost without a word.
A file without a version is older than versions are, and is read as 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peftfx.errors import PeftfxError, shown
from peftfx.files import read_json
from peftfx.version import __version__

FORMAT = "format"  #: the field that has it
SLOTS, BATCHED, REPORT = "peftfx_slots.json", "peftfx_adapters.json", "peftfx_report.json"  #: beside a model
LABELS = "peftfx_labels.json"  #: in an adapter's directory: what the classes of its head are called
RULES = "peftfx_rules.json"  #: in an adapter's directory: the folders, one a rule, of what several rules made
ADAPTER = ".onnx_adapter"  #: the end of a name; the format is ONNX Runtime's, the version of what is in it ours

#: What this peftfx writes, and the newest that it reads. A change that an older reader would not understand adds 1.
VERSIONS: Mapping[str, int] = {SLOTS: 1, BATCHED: 1, REPORT: 1, RULES: 1, LABELS: 1, ADAPTER: 1}


def with_version(name: str, values: Mapping[str, object]) -> dict[str, object]:
    """The values of a file of this name, with its version ahead."""
    return {FORMAT: VERSIONS[name], **values}


def read_stamped(path: Path, hint: str) -> dict[str, object]:
    """The values of a JSON file of peftfx's own, without its version.

    Raises:
        PeftfxError: it cannot be read, or is newer than this peftfx.
    """
    values = read_json(path, hint)
    refuse_newer(values.pop(FORMAT, 1), path.name, path, hint)
    return values


def refuse_newer(version: object, name: str, path: Path, hint: str) -> None:
    """Refuse a file whose version is none, or newer than what this peftfx reads."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PeftfxError(f"not a version of a format: {FORMAT}={shown(version)}", str(path), hint)
    if version > VERSIONS[name]:
        what = f"written in format {version}, and peftfx {__version__} reads formats up to {VERSIONS[name]}"
        raise PeftfxError(what, str(path), f"install a newer peftfx, or {hint} with this one")
