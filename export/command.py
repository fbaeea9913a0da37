"""What the command line does: directories in, a directory out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from peftfx.adapted import AdaptedModel
from peftfx.api import bare, plan
from peftfx.bases import load_base, read_base_config
from peftfx.errors import PeftfxError
from peftfx.export.adapters import export_adapter
from peftfx.export.deploy import Progress, copy_assets, export_onnx
from peftfx.export.onnx import CPU, FAST, check_engine, check_opset, check_optimize
from peftfx.export.quantize import check_quantization
from peftfx.export.report import Report
from peftfx.export.weights import Written
from peftfx.files import Snapshot
from peftfx.peft_files import CONFIG, Weights, method_from_config, read_config, rule_folders
from peftfx.planning import Plan
from peftfx.rules import saved_modules
from peftfx.sites import Sites
from peftfx.slots import Manifest
from peftfx.tasks import resolve_task, task_of_class

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_directory(
    base: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    merge: bool = True,
    task: str | None = None,
    view: str = "forward",
    opset: int | None = None,
    dtype: str | None = None,
    engine: str = FAST,
    optimize: str = CPU,
    quantize: str | None = None,
    max_error: float | None = None,
    slots: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    written: Written | None = None,
    max_memory: int | None = None,
) -> Report:
    """Export a base model's directory, with a HF PEFT adapter's or without, to a directory that ONNX Runtime serves.

    `dtype` (`fp32`, `fp16`, `bf16`) is that of the weights, merged in fp32 and rounded once; by default the base's own,
    but fp32 for a bfloat16 base: ONNX Runtime's CPU provider has no kernels for it.

    `view` is `forward`, `decode`, with the key/value cache in and out, or `auto`: `decode` for what generates text.

    `slots` makes a graph of the base in which adapters are put when it runs: a target that says at which linear sites;
    see `peftfx.export.swappable`.

    The inputs are read where they are: one that changes meanwhile is an error.

    Raises:
        PeftfxError: bad input; VerificationError: ONNX Runtime and torch disagree. Either way nothing is left.
    """
    base, output = Path(base), Path(output)
    _refuse_output(base, output, adapter, force)
    check_opset(opset)
    check_engine(engine)
    check_optimize(optimize)
    check_quantization(quantize, max_error)
    say = progress or (lambda line: None)
    inputs = Snapshot(base, *(() if adapter is None else (Path(adapter), *rule_folders(Path(adapter)))))
    kept = _served_dtype(base, dtype)
    say("load" if kept is None else f"load in {str(kept).removeprefix('torch.')}")
    adapted = load_directories(base, None if adapter is None else Path(adapter), task=task, dtype=kept)

    def assets(directory: Path) -> None:
        for source in (base, *(() if adapter is None else (Path(adapter),))):
            copy_assets(source, directory)
        inputs.check()

    return export_onnx(
        *(adapted, output),
        merge=merge,
        view=view,
        opset=opset,
        engine=engine,
        optimize=optimize,
        quantize=quantize,
        max_error=max_error,
        slots=slots,
        source=base.resolve(),
        force=force,
        assets=assets,
        progress=progress,
        written=written,
        max_memory=max_memory,
    )


def export_adapter_directories(
    adapters: Sequence[str],
    graph: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    combination: str = "cat",
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write HF PEFT directories as one `.onnx_adapter` file for a directory that was exported with slots.

    Args:
        adapters: directories; their effects add up, each times a weight where it is given: `DIR=0.5`.
        graph: the exported directory.
        output: the file.
        base: the base model's directory; by default the one that the graph was exported from.
        combination: how weighted adapters are combined; see `AdaptedModel.add_weighted_adapter`.
        check: run it in ONNX Runtime against torch.
        force: replace the file if it exists.
        progress: called with a line when a stage begins.

    Raises:
        PeftfxError: bad input; VerificationError: ONNX Runtime and torch disagree. Either way nothing is left.
    """
    say = progress or (lambda line: None)
    manifest = Manifest.read(Path(graph))
    source = Path(base or manifest.base)
    if not (base or manifest.base) or not source.is_dir():
        what = (
            f"the base model is not where it was: {manifest.base}" if manifest.base else "it is not said of which base"
        )
        raise PeftfxError(what, str(graph), "pass --base DIR")
    given = [_weighted(text) for text in adapters]
    say("load")
    model = load_base(source, task=task_of_class(manifest.model), dtype=getattr(torch, manifest.dtype))
    adapted = bare(model)
    names = [f"adapter_{i}" for i in range(len(given))]
    for name, (folder, _) in zip(names, given, strict=True):
        adapted.load_adapter(folder, name)
    if any(weight is not None for _, weight in given):
        weights = [1.0 if weight is None else weight for _, weight in given]
        adapted.add_weighted_adapter(names, weights, "weighted", combination)
    else:
        adapted.set_adapter(names)
    say("write and verify" if check else "write")
    return export_adapter(adapted, graph, output, check=check, force=force)


def _weighted(text: str) -> tuple[Path, float | None]:
    """A directory, and its weight if it has one: `DIR=0.5`."""
    folder, _, weight = text.rpartition("=")
    if not folder or Path(text).exists():
        return Path(text), None
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise PeftfxError(f"not a weight: {weight!r}", text, "as in --adapter DIR=0.5") from None


def _served_dtype(base: Path, wanted: str | None) -> torch.dtype | None:
    """What to load the base in; None is its own."""
    if wanted is None:
        config = read_base_config(base)
        own = config.get("dtype", config.get("torch_dtype"))
        return torch.float32 if own == "bfloat16" else None
    if wanted not in DTYPES:
        raise PeftfxError(f"unknown dtype {wanted!r}", "dtype", f"one of {', '.join(DTYPES)}")
    return DTYPES[wanted]


def load_directories(
    base: Path, adapter: Path | None, *, task: str | None = None, dtype: torch.dtype | None = None
) -> AdaptedModel:
    """A base model with an adapter on it, both from directories.

    A head that the adapter holds sets the number of labels, whatever the base's config says.
    """
    config = read_base_config(base)
    if adapter is None:
        return bare(load_base(base, task=task, dtype=dtype))
    configs = {folder: read_config(folder) for folder in rule_folders(adapter)}
    methods = {folder: method_from_config(own, str(folder / CONFIG)) for folder, own in configs.items()}
    weights = {folder: Weights(folder, method.prefix) for folder, method in methods.items()}
    kinds = [own["task_type"] for own in configs.values() if own.get("task_type") is not None]
    if task is None and kinds:
        task = resolve_task(None, peft_task_type=str(kinds[0]), config=config)
    labels = None
    for folder in (folder for folder, method in methods.items() if method.modules_to_save):
        labels = labels or _labels(load_base(base, task=task, weights=False), weights[folder], methods[folder])
    given = {name.replace(".base_layer.", ".") for own in weights.values() for name in own.names}
    model = load_base(base, task=task, num_labels=labels, given=given, dtype=dtype)
    adapted = bare(model)
    adapted.load_adapter(adapter, "default")
    return adapted


def inspect_directory(directory: str | Path, *, task: str | None = None, target: str | None = None) -> Sites:
    """The sites of a model in a directory; its weights are not read."""
    sites = bare(load_base(Path(directory), task=task, weights=False)).sites
    return sites if target is None else Sites(tuple(match.site for match in sites.select(target)))


def plan_directory(directory: str | Path, rules: str, *, task: str | None = None) -> Plan:
    """What rules would do to a model in a directory; its weights are not read."""
    return plan(load_base(Path(directory), task=task, weights=False), rules)


def _labels(model: nn.Module, weights: Weights, method: object) -> int | None:
    """The number of labels of the head in an adapter, where it is not the model's."""
    own = getattr(getattr(model, "config", None), "num_labels", None)
    for path in saved_modules(model, method):  # type: ignore[arg-type]
        for name, tensor in model.get_submodule(path).state_dict().items():
            shape = weights.shapes.get(f"{path}.{name}")
            if shape and tensor.shape[:1] == (own,) and shape[1:] == tuple(tensor.shape[1:]) and shape[0] != own:
                return int(shape[0])
    return None


def _refuse_output(base: Path, output: Path, adapter: str | Path | None, force: bool) -> None:
    """Refuse at once what would be refused after minutes of work."""
    if output.exists() and not force:
        raise PeftfxError("the output exists already", str(output), "pass --force (force=True) to replace it")
    inputs = [base.resolve(), *([] if adapter is None else [Path(adapter).resolve()])]
    target = output.resolve()
    if any(target == i or target in i.parents for i in inputs):
        raise PeftfxError("the output would replace an input", str(output), "choose another output directory")
    free = shutil.disk_usage(next(p for p in (target, *target.parents) if p.exists())).free
    needed = sum(p.stat().st_size for p in base.glob("*.safetensors")) if base.is_dir() else 0
    if needed > free:
        raise PeftfxError(
            f"{free:,} bytes are free, {needed:,} are needed", str(output), "free space, or choose another disk"
        )
