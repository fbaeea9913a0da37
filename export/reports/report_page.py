"""The page that shows the report of an export, or two reports side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftfx.errors import PeftfxError
from peftfx.files import is_file
from peftfx.formats import REPORT, read_stamped
from peftfx.pages.page import Page, bars, make_page, table, text

_MOST = 40  #: the most rows of a table of places
_DATA = (".onnx", ".onnx.data")  #: the ends of the names of graphs and their weights
_MERGED = "differences"  #: what the report of a merged model has, and that of an export has not
_KNOWN = ("model", "adapters", "tensors", "bytes", "seconds", "comparisons", "probes")


def report_page(directories: Sequence[Path]) -> Page:
    """Make the page of one or several exports, given their directories.

    Raises:
        PeftfxError: a directory has no report, or a report that cannot be read.
    """
    reports = [read_report(directory) for directory in directories]
    most = {name: _largest(reports, name) for name in ("bytes", "seconds", "memory")}
    columns = [_page(report, directory, most) for report, directory in zip(reports, directories, strict=True)]
    names = " and ".join(directory.name or str(directory) for directory in directories)
    body = f'<main><div class="pair">{"".join(f"<div>{column}</div>" for column in columns)}</div></main>'
    return make_page(f"Export {names}", ", ".join(dict.fromkeys(str(report["model"]) for report in reports)), body)


def read_report(directory: Path) -> Mapping[str, Any]:
    """Read the `peftfx_report.json` of an export in `directory`.

    Raises:
        PeftfxError: the report is missing or damaged.
    """
    path = directory / REPORT
    if not is_file(path):
        raise PeftfxError(f"there is no {REPORT}", str(directory), "give the directory that `peftfx export` wrote")
    found = read_stamped(path, "export the model again")
    if _MERGED in found:
        hint = "export it with `peftfx export --base`, and give the directory that this writes"
        raise PeftfxError("this is a merged model, and not an export", str(directory), hint)
    kinds = {"model": str, "adapters": list, "comparisons": list, "probes": list}
    if any(not isinstance(found.get(name), kinds.get(name, dict)) for name in _KNOWN):
        raise PeftfxError("not the report of an export", str(path), "export the model again")
    return found


def merged_report(directory: Path) -> Mapping[str, Any] | None:
    """Return the report of a merge into `directory`; None where there is no report, or that of an export.

    Raises:
        PeftfxError: the report is damaged.
    """
    path = directory / REPORT
    if not is_file(path):
        return None
    found = read_stamped(path, "merge the model again")
    if _MERGED not in found:
        return None
    kinds = {"model": str, "methods": list, "differences": list, "bytes": dict, "versions": dict}
    if any(not isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise PeftfxError("not the report of a merge", str(path), "merge the model again")
    return found


def changed_files(directory: Path, report: Mapping[str, Any]) -> list[str]:
    """Return the graphs and weights of an export that are missing, or have another size than its report tells."""
    found = []
    for name, size in report["bytes"].items():
        path = directory / name
        if not name.endswith(_DATA) or not isinstance(size, int):
            continue
        if not is_file(path):
            found.append(f"{name} is missing")
        elif (now := path.stat().st_size) != size:
            found.append(f"{name} has {now:,} bytes, and was written with {size:,}")
    return found


def _largest(reports: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the largest number under this name in all reports, so that bars side by side have one scale."""
    found = [report[name] for report in reports if isinstance(report.get(name), dict)]
    return max((float(v) for values in found for v in values.values() if isinstance(v, int | float)), default=0.0)


def _page(report: Mapping[str, Any], directory: Path, most: Mapping[str, float]) -> str:
    try:
        return "".join(_sections(report, directory, most))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        what = f"not the report of an export: {type(error).__name__}: {error}"
        raise PeftfxError(what, str(directory / REPORT), "export the model again") from error


def _sections(report: Mapping[str, Any], directory: Path, most: Mapping[str, float]) -> list[str]:
    adapters = [(a["name"], "+".join(a["methods"]), int(a["parameters"]), int(a["bytes"])) for a in report["adapters"]]
    facts = [
        ("compared with", report.get("reference", "")),
        ("verified", report.get("verified", "")),
        ("ONNX", f"opset {report.get('opset')}, {report.get('nodes'):,} nodes, engine {report.get('engine')}"),
        ("right where", "; ".join(report.get("sizes", [])) or "everywhere"),
        ("versions", ", ".join(f"{n} {v}" for n, v in report.get("versions", {}).items())),
    ]
    return [
        f"<h2>{text(directory)}</h2>",
        table(("", ""), [fact for fact in facts if fact[1]]),
        table(("adapter", "methods", "parameters", "bytes"), adapters, "Adapters"),
        _counts("Where each tensor of the adapters went", report["tensors"]),
        _sized("Files, in bytes", report["bytes"], "{:,}", most["bytes"]),
        _sized("Time by stage, in seconds", report["seconds"], "{:.1f}", most["seconds"]),
        _memory(report.get("memory", {}), most["memory"]),
        _errors(report),
        _probes(report),
        _rounding(report),
        _fused(report),
        _quantised(report),
    ]


def _counts(caption: str, counts: Mapping[str, int]) -> str:
    return _sized(caption, counts, "{:,}") if counts else ""


def _memory(memory: Mapping[str, float], largest: float) -> str:
    caption = "The most memory by stage, in MB, without mapped files"
    in_mb = {name: value / 1e6 for name, value in memory.items()}
    return _sized(caption, in_mb, "{:,.0f}", largest / 1e6) if memory else ""


def _sized(caption: str, values: Mapping[str, float], form: str, largest: float | None = None) -> str:
    said = {name: form.format(value) for name, value in values.items()}
    return bars({name: float(value) for name, value in values.items()}, said, caption, largest)


def _errors(report: Mapping[str, Any]) -> str:
    """Make the table of the largest difference of each output, over all sizes that were tried."""
    worst: dict[str, dict[str, Any]] = {}
    for found in report["comparisons"]:
        name = found["output"]
        if name not in worst or found["max_abs"] > worst[name]["max_abs"]:
            worst[name] = found
    measured = any(c["float32"] is not None for c in worst.values())
    head = ["output", "difference", "of the largest", "allowed", *(["torch's own rounding"] if measured else [])]
    rows: list[list[object]] = []
    for name, c in list(worst.items())[:_MOST]:
        own = [_number(c["float32"])] if measured else []
        rows.append([name, float(c["max_abs"]), float(c["max_rel"]), _allowed(c["bound"]), *own])
    return table(head, rows, _cut("Error by output, ONNX Runtime against torch", len(worst)))


def _allowed(bound: float | None) -> object:
    """Return the tolerance of an output. The outputs of a quantised model have none: they only have to be finite."""
    return "finite" if bound is None else bound


def _number(value: object) -> object:
    return "" if value is None else float(str(value))


def _probes(report: Mapping[str, Any]) -> str:
    """Make the table of the largest difference at each size that was tried."""
    worst: dict[int, float] = {}
    for found in report["comparisons"]:
        worst[found["probe"]] = max(worst.get(found["probe"], 0.0), float(found["max_abs"]))
    probes = report["probes"]
    rows: list[tuple[object, ...]] = []
    for number, error in sorted(worst.items()):
        shapes = "; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in list(probes[number].items())[:4])
        rows.append((shapes, error))
    return table(("sizes of a call", "difference"), rows, "Error by size") if rows else ""


def _rounding(report: Mapping[str, Any]) -> str:
    rounded = sorted(report.get("rounding", {}).items(), key=lambda item: -item[1]["max_rel"])
    merged = report.get("merged", [])
    if not rounded:
        return f"<p>{len(merged)} weights were merged; none was rounded.</p>" if merged else ""
    rows: list[tuple[object, ...]] = [(p, float(r["max_abs"]), float(r["max_rel"])) for p, r in rounded[:_MOST]]
    caption = _cut("What rounding took from merged weights", len(rounded))
    return table(("weight", "at most", "of the largest"), rows, caption)


def _fused(report: Mapping[str, Any]) -> str:
    engine, fused = str(report.get("engine", "")), report.get("fused", {})
    why = engine.partition(":")[2].strip()
    rows: list[tuple[object, ...]] = [(name, int(count)) for name, count in fused.items()]
    if not rows:
        return f"<p>Nothing was fused{f': {text(why)}' if why else ''}.</p>"
    return table(("operator", "how many"), rows, "Fused operators")


def _quantised(report: Mapping[str, Any]) -> str:
    found = []
    for graph, schemes in report.get("schemes", {}).items():
        found.append(_counts(f"Quantised weights, {graph}", schemes))
    for graph, names in report.get("quantized", {}).items():
        layers = Counter(name.rpartition(".")[0] for name in names)
        rows: list[tuple[object, ...]] = [(name, count) for name, count in list(layers.items())[:_MOST]]
        found.append(table(("layer", "weights"), rows, _cut(f"Quantised layers, {graph}", len(layers))) if rows else "")
    for graph, choices in report.get("codes", {}).items():
        rows = [(", ".join(f"{k} {v}" for k, v in choice.items()),) for choice in choices]
        found.append(table(("format and operator",), rows, f"Codes of the base, {graph}"))
    return "".join(found)


def _cut(caption: str, count: int) -> str:
    return f"{caption} (the first {_MOST} of {count})" if count > _MOST else caption
