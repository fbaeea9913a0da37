"""Say what a directory or a file holds: an adapter, an export, an `.onnx_adapter` file, or a base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftfx.bases.files.folder import read_base_config
from peftfx.bases.files.gguf import gguf_config
from peftfx.errors import PeftfxError
from peftfx.export.reports.report_page import changed_files, merged_report, read_report
from peftfx.files import is_file, is_folder, is_gguf
from peftfx.formats import ADAPTER, BATCHED, REPORT, RULES, SLOTS
from peftfx.graph.slots import Manifest
from peftfx.rules.peft_files import CONFIG, Weights, read_adapter_config, rule_folders
from peftfx.rules.text import write_rule
from peftfx.rules.tied_copies import method_of_file

_FILES = {".safetensors": "a file of tensors", ".onnx": "a graph", ".onnx.data": "the weights of a graph"}
_MOST = 8  #: items that are told in words; JSON has them all


@dataclass(frozen=True)
class About:
    """The kind of a directory or file, and facts about it.

    Attributes:
        kind: `adapter`, `export`, `slots` or `base`.
        facts: the facts, by their names.
    """

    kind: str
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        width = max((len(name) for name in self.facts), default=0)
        return "\n".join([self.kind, *(f"  {name:{width}}  {_words(value)}" for name, value in self.facts.items())])


def about(path: Path) -> About:
    """Find out what is at a path.

    Raises:
        PeftfxError: nothing is at the path, or something unknown or damaged.
    """
    if is_file(path) and path.name.endswith(ADAPTER):
        return _slots(path)
    if is_gguf(path):
        return _gguf(path)
    if is_file(path):
        kind = next((kind for ending, kind in _FILES.items() if path.name.endswith(ending)), "a file")
        raise PeftfxError(f"this is {kind}, and info takes a directory", str(path), f"give its folder: {path.parent}")
    if not is_folder(path):
        hint = "give the directory of an adapter, an export or a base, or an .onnx_adapter or .gguf file"
        raise PeftfxError("there is no such directory", str(path), hint)
    if path.name.endswith(ADAPTER):
        return _slots(path)
    if (merged := merged_report(path)) is not None:
        return _merged(path, merged)
    if is_file(path / REPORT):
        return _export(path)
    if is_file(path / CONFIG) or is_file(path / RULES):
        return _adapter(path)
    return _base(path)


def _adapter(path: Path) -> About:
    facts: dict[str, Any] = {}
    tensors, parameters, size = 0, 0, 0
    dtypes: Counter[str] = Counter()
    rules = []
    for folder in rule_folders(path):
        config = read_adapter_config(folder)
        method = method_of_file(config, str(folder / CONFIG))
        weights = Weights(folder, method.prefix)
        rules.append(write_rule(method))
        tensors += len(weights.names)
        parameters += sum(_product(shape) for shape in weights.shapes.values())
        dtypes.update(str(weights[name].dtype).removeprefix("torch.") for name in weights.names)
        size += weights.path.stat().st_size
        facts |= {k: config[k] for k in ("base_model_name_or_path", "task_type", "peft_version") if config.get(k)}
    found = {"rules": rules, "tensors": tensors, "parameters": parameters, "bytes": size, "dtypes": dict(dtypes)}
    return About("adapter", found | facts)


def _export(path: Path) -> About:
    report = read_report(path)
    facts: dict[str, Any] = {
        "model": report["model"],
        "adapters": [_adapter_line(adapter) for adapter in report["adapters"]],
        "inputs": [f"{name} [{', '.join(map(str, shape))}]" for name, shape in report.get("inputs", {}).items()],
        "outputs": report.get("outputs", []),
        "files": report["bytes"],
        "not as written": changed_files(path, report),
        "opset": report.get("opset"),
        "nodes": report.get("nodes"),
        "fused": report.get("fused", {}),
        "schemes": report.get("schemes", {}),
        "right where": report.get("sizes", []),
        "compared with": report.get("reference", ""),
        "largest difference": max((float(c["max_abs"]) for c in report["comparisons"]), default=0.0),
        "versions": report.get("versions", {}),
    }
    if is_file(path / SLOTS):
        manifest = Manifest.read(path)
        facts["slots"] = f"{len(manifest.slots)}, of {manifest.model}, base {manifest.fingerprint}"
    if is_file(path / BATCHED):
        facts["adapters by row"] = str(path / BATCHED)
    return About("export", {name: value for name, value in facts.items() if value not in ([], {}, "", None)})


def _adapter_line(adapter: Mapping[str, Any]) -> str:
    return f"{adapter['name']}: {'+'.join(adapter['methods'])}, {adapter['parameters']:,} parameters"


def _slots(path: Path) -> About:
    """Tell of an `.onnx_adapter`, whose names begin with the graph's if it is a directory with a file for each."""
    from peftfx.serving.adapter_file import adapter_files, read_adapter_file

    if not (files := adapter_files(path)):
        raise PeftfxError("the directory has no file for a graph", str(path), "`peftfx export-adapter` writes them")
    bases, shapes = set[str](), dict[str, str]()
    for file in files:
        number, values = read_adapter_file(file)
        graph = "" if file == path else f"{file.name.removesuffix(ADAPTER)}."
        bases.add(f"{number:08x}")
        shapes |= {f"{graph}{name}": "x".join(map(str, value.shape())) for name, value in sorted(values.items())}
    size = sum(file.stat().st_size for file in files)
    return About("slots", {"base": ", ".join(sorted(bases)), "tensors": len(shapes), "bytes": size, "shapes": shapes})


def _merged(path: Path, report: Mapping[str, Any]) -> About:
    facts: dict[str, Any] = {
        "merged": report["methods"],
        "largest difference": max((float(d["max_abs"]) for d in report["differences"]), default=0.0),
        "versions": report["versions"],
    }
    return About("base", {**_base(path).facts, **{name: value for name, value in facts.items() if value}})


def _base(path: Path) -> About:
    facts = _of_config(read_base_config(path))
    files = {p.name: p.stat().st_size for p in sorted(path.glob("*.safetensors"))}
    return About("base", facts | {"files": files} if files else facts)


def _gguf(path: Path) -> About:
    facts = _of_config(gguf_config(path).to_dict())
    return About("base", facts | {"files": {path.name: path.stat().st_size}})


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("architectures", "_class_name", "model_type", "dtype", "torch_dtype", "vocab_size", "quantization_config")
    return {name: config[name] for name in wanted if config.get(name) is not None}


def _first(items: Sequence[str], between: str) -> str:
    more = [f"and {len(items) - _MOST} more"] if len(items) > _MOST else []
    return between.join([*items[:_MOST], *more])


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _words(value: object) -> str:
    """A value in words: of many items the first, and how many more there are."""
    if isinstance(value, Mapping):
        return _first([f"{name} {_words(own)}" for name, own in value.items()], ", ")
    if isinstance(value, (list, tuple)):
        return _first([_words(own) for own in value], "; ")
    if isinstance(value, bool):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}" if isinstance(value, float) else str(value)
