"""Compare two adapters, or two exports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.reports.report_page import changed_files, read_report
from peftfx.files import is_file
from peftfx.formats import REPORT
from peftfx.rules.peft_files import CONFIG, Weights, read_adapter_config, rule_folders
from peftfx.rules.tied_copies import method_of_file

_MOST, _FEW = 20, 4  #: the most items of a kind that are listed; the most items of one list
_DIGITS = 16  #: as many of a digest are shown
#: The fields of a report in which two runs of the same export differ.
_PASSING = ("seconds", "memory", "probes", "comparisons")


@dataclass(frozen=True)
class Differences:
    """The differences between two adapters or two exports. Empty if they are the same.

    Attributes:
        kind: `adapter` or `export`.
        fields: options or facts, each with its two values.
        only_first, only_second: the names of tensors that only the first, or only the second, has.
        tensors: for each tensor that both have and that differs, the largest difference, and the norm of the difference
            relative to the first's norm; if the shapes differ, the two shapes.
        same: the number of equal tensors.
    """

    kind: str
    fields: Mapping[str, tuple[Any, Any]]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    tensors: Mapping[str, Mapping[str, Any]] | None = None
    same: int = 0

    @property
    def any(self) -> bool:
        """Whether there is a difference."""
        return bool(self.fields or self.only_first or self.only_second or self.tensors)

    def __str__(self) -> str:
        if not self.any:
            return f"the same {self.kind}" + (f": {self.same} tensors" if self.same else "")
        lines = [f"{name}: {_short(first)} | {_short(second)}" for name, (first, second) in self.fields.items()]
        lines += _listed("in the first alone", self.only_first) + _listed("in the second alone", self.only_second)
        told = [f"{n}: {', '.join(f'{k} {_short(v)}' for k, v in d.items())}" for n, d in (self.tensors or {}).items()]
        lines += _listed("tensors that differ", told)
        return "\n".join([*lines, *([f"equal tensors: {self.same}"] if self.same else [])])


def differences(first: Path, second: Path) -> Differences:
    """Compare two directories.

    Raises:
        PeftfxError: the directories are of different kinds, are neither adapters nor exports, or are damaged.
    """
    kinds = [is_file(path / REPORT) for path in (first, second)]
    if all(kinds):
        a, b = read_report(first), read_report(second)
        changed = changed_files(first, a), changed_files(second, b)
        fields = _fields(_leave(a, _PASSING), _leave(b, _PASSING)) | _contents(first, second, a["bytes"])
        return Differences("export", fields | ({"not as written": changed} if any(changed) else {}))
    if any(kinds):
        what = "an export and something else have nothing to compare"
        raise PeftfxError(what, f"{first}, {second}", "give two exports, or two adapters")
    return _of_adapters(first, second)


def _contents(first: Path, second: Path, names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Return the files of equal size whose bytes differ, by the start of their SHA-256: no report has weights."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in names:
        one, other = first / name, second / name
        if is_file(one) and is_file(other) and one.stat().st_size == other.stat().st_size:
            a, b = _sha256(one), _sha256(other)
            found |= {f"content.{name}": (a[:_DIGITS], b[:_DIGITS])} if a != b else {}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_adapters(first: Path, second: Path) -> Differences:
    folders = rule_folders(first), rule_folders(second)
    if len(folders[0]) != len(folders[1]):
        return Differences("adapter", {"rules": (len(folders[0]), len(folders[1]))})
    fields: dict[str, tuple[Any, Any]] = {}
    tensors: dict[str, Mapping[str, Any]] = {}
    alone: tuple[list[str], list[str]] = ([], [])
    same = 0
    for own, other in zip(*folders, strict=True):
        configs = read_adapter_config(own), read_adapter_config(other)
        ahead = f"{own.name}." if len(folders[0]) > 1 else ""
        fields |= {f"{ahead}{name}": values for name, values in _fields(*configs).items()}
        a, b = (_weights(folder, config) for folder, config in zip((own, other), configs, strict=True))
        alone[0].extend(sorted(f"{ahead}{n}" for n in a.names.keys() - b.names.keys()))
        alone[1].extend(sorted(f"{ahead}{n}" for n in b.names.keys() - a.names.keys()))
        for name in sorted(a.names.keys() & b.names.keys()):
            found = _between(a[name], b[name])
            same += found is None
            tensors |= {} if found is None else {f"{ahead}{name}": found}
    return Differences("adapter", fields, tuple(alone[0]), tuple(alone[1]), tensors, same)


def _weights(folder: Path, config: Mapping[str, object]) -> Weights:
    return Weights(folder, method_of_file(config, str(folder / CONFIG)).prefix)


def _between(a: Tensor, b: Tensor) -> Mapping[str, Any] | None:
    """Compare two tensors. Return None if they are equal."""
    if a.shape != b.shape:
        return {"shapes": [list(a.shape), list(b.shape)]}
    if a.dtype == b.dtype and bool(a.equal(b)):
        return None
    difference, norm = (a.double() - b.double()), float(a.double().norm())
    own = {} if a.dtype == b.dtype else {"dtypes": [str(t.dtype).removeprefix("torch.") for t in (a, b)]}
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return {**own, "max_abs": largest, "relative": float(difference.norm()) / norm if norm else float("inf")}


def _fields(a: Mapping[str, Any], b: Mapping[str, Any], ahead: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the leaves that differ between two mappings, by dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*a, *b)):
        one, other = a.get(name), b.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= _fields(one, other, f"{ahead}{name}.")
        elif one != other:
            found[f"{ahead}{name}"] = (one, other)
    return found


def _leave(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _listed(what: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    more = [f"  and {len(items) - _MOST} more"] if len(items) > _MOST else []
    return [f"{what}: {len(items)}", *(f"  {item}" for item in items[:_MOST]), *more]


def _short(value: object) -> str:
    """A value in words: of a list the first few, and how many more there are."""
    if isinstance(value, Mapping):
        value = [f"{name} {_short(own)}" for name, own in value.items()]
    if isinstance(value, (list, tuple)):
        more = [f"and {len(value) - _FEW} more"] if len(value) > _FEW else []
        return f"[{', '.join([*map(_short, value[:_FEW]), *more])}]"
    return "nothing" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
