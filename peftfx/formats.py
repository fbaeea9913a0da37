"""The format versions of peftfx's own files; `docs/formats.md` describes the formats.

A file of an older version is read. A file of a newer version is refused, because its new content would be lost
silently. A file without a version was written before there were versions, and is read as version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peftfx.errors import PeftfxError, shown
from peftfx.files import read_json
from peftfx.version import __version__

FORMAT = "format"  #: the field that holds the version
SLOTS, BATCHED, REPORT = "peftfx_slots.json", "peftfx_adapters.json", "peftfx_report.json"  #: files beside a model
LABELS = "peftfx_labels.json"  #: in an adapter's directory: the names of its head's classes
PIPELINE = "peftfx_pipeline.json"  #: in the directory of an exported pipeline: its files
RULES = "peftfx_rules.json"  #: in an adapter's directory: the folders of its rules, if several rules made the adapter
SIZES_KEY = "peftfx.sizes"  #: metadata key: the conditions on a call's sizes under which the model is right
POSITIONS_KEY = "peftfx.positions"  #: metadata key: how the model's code counts positions that a call leaves out
FROM_MASK, FROM_ONE, OWN_WAY = "mask", "one", "own"  #: its values: tokens that the mask shows; places from 1; otherwise
ADAPTER = ".onnx_adapter"  #: the ending of a file's name; the format is ONNX Runtime's, the version that of peftfx

#: The versions that this peftfx writes, and the newest that it reads. A change that breaks an older reader adds 1.
VERSIONS: Mapping[str, int] = {SLOTS: 3, BATCHED: 1, REPORT: 1, RULES: 1, LABELS: 1, PIPELINE: 1, ADAPTER: 1}


def with_version(name: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return the values of a file of this name, with the file's version first."""
    return {FORMAT: VERSIONS[name], **values}


def read_stamped(path: Path, hint: str) -> dict[str, object]:
    """Return the values of a JSON file of peftfx's own, without its version.

    Raises:
        PeftfxError: the file cannot be read, or its version is newer than this peftfx reads.
    """
    values = read_json(path, hint)
    refuse_newer(values.pop(FORMAT, 1), path.name, path, hint)
    return values


def refuse_newer(version: object, name: str, path: Path, hint: str) -> None:
    """Refuse a file whose version is not valid, or newer than this peftfx reads."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PeftfxError(f"not a version of a format: {FORMAT}={shown(version)}", str(path), hint)
    if version > VERSIONS[name]:
        what = f"written in format {version}, and peftfx {__version__} reads formats up to {VERSIONS[name]}"
        raise PeftfxError(what, str(path), f"install a newer peftfx, or {hint} with this one")
