"""What the command line does: directories in, a directory out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from peftfx.adapters.files.base_weights import resize_vocabulary
from peftfx.bases.gguf import takes_gguf
from peftfx.bases.load import load_base, read_base_config
from peftfx.bases.tasks import resolve_task
from peftfx.errors import PeftfxError
from peftfx.export.assets import copy_assets
from peftfx.export.onnx_directory import Progress, export_onnx
from peftfx.export.report import Report
from peftfx.export.slots.swappable import Slots
from peftfx.export.verification.agreement import MaxError, check_text
from peftfx.export.verification.tolerance import check_tolerance
from peftfx.export.writing.atomic_directory import check_output
from peftfx.export.writing.quantization import check_quantization
from peftfx.export.writing.weights import Written
from peftfx.files import Snapshot
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare, plan
from peftfx.model.plan import Plan
from peftfx.options import CPU, FAST, check_dtype, check_engine, check_opset, check_optimize, check_view
from peftfx.rules.peft_files import CONFIG, Weights, method_from_config, read_config, rule_folders
from peftfx.rules.resolution import saved_modules
from peftfx.sites.sites import Sites

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@takes_gguf
def export_directory(
    base: Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    batched: Mapping[str, str | Path] | None = None,
    merge: bool = True,
    task: str | None = None,
    view: str = "forward",
    opset: int | None = None,
    dtype: str | None = None,
    engine: str = FAST,
    optimize: str = CPU,
    quantize: str | None = None,
    max_error: float | str | None = None,
    calibration: str | Path | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    slots: Slots | str | None = None,
    force: bool = False,
    allow_fixed: bool = False,
    progress: Progress | None = None,
    written: Written | None = None,
    max_memory: int | None = None,
) -> Report:
    """Export a base model's directory, with a HF PEFT adapter's or without, to a directory that ONNX Runtime serves.

    `base` may be a GGUF file.

    `dtype` (`fp32`, `fp16`, `bf16`) is that of the weights, merged in fp32 and rounded once; by default the base's own,
    but fp32 for a bfloat16 base: ONNX Runtime's CPU provider has no kernels for it.

    `view` is `forward`, `decode`, with the key/value cache in and out, or `auto`: `decode` for what generates text.

    `slots` makes a graph of the base in which adapters are put when it runs: a target that says at which layers;
    see `peftfx.export.slots.swappable`.

    `batched` has adapters by name, among which each row of a batch chooses; see `peftfx.export.slots.batched`.

    `allow_fixed` exports a model whose code branches on a size, though the export is right on one side alone.

    The inputs are read where they are: one that changes meanwhile is an error.

    Raises:
        PeftfxError: bad input; VerificationError: ONNX Runtime and torch disagree. Either way nothing is left.
    """
    named = {name: Path(folder) for name, folder in (batched or {}).items()}
    if adapter is not None:
        if named:
            raise PeftfxError("an adapter for all rows, and some to choose from", str(adapter), "give it a name too")
        named = {"default": Path(adapter)}
    _refuse_output(base, output, list(named.values()), force)
    check_view(view)
    check_dtype(dtype)
    check_opset(opset)
    check_engine(engine)
    check_optimize(optimize)
    check_quantization(quantize, max_error, calibration)
    MaxError.of(max_error)
    check_tolerance(atol, rtol)
    if calibration is not None:
        check_text(Path(calibration))
    say = progress or (lambda line: None)
    inputs = Snapshot(base, *(part for folder in named.values() for part in (folder, *rule_folders(folder))))
    kept = _served_dtype(base, dtype)
    say("load" if kept is None else f"load in {str(kept).removeprefix('torch.')}")
    adapted = load_directories(base, named, task=task, dtype=kept)

    def assets(directory: Path) -> None:
        links = [link for folder in reversed(named.values()) for link in copy_assets(folder, directory, "config.json")]
        links += copy_assets(base, directory)  # behind the adapters': a tokenizer trained with one is its own
        if links:
            say(f"not copied, links that leave their directory: {', '.join(map(str, links))}")
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
        calibration=calibration,
        atol=atol,
        rtol=rtol,
        slots=slots,
        batched=tuple(batched or ()),
        source=base.resolve(),
        force=force,
        allow_fixed=allow_fixed,
        assets=assets,
        progress=progress,
        written=written,
        max_memory=max_memory,
    )


def _served_dtype(base: Path, wanted: str | None) -> torch.dtype | None:
    """What to load the base in; None is its own."""
    if wanted is None:
        config = read_base_config(base)
        own = config.get("dtype", config.get("torch_dtype"))
        return torch.float32 if own == "bfloat16" else None
    return _DTYPES[wanted]


def load_directories(
    base: Path, adapters: Mapping[str, Path], *, task: str | None = None, dtype: torch.dtype | None = None
) -> AdaptedModel:
    """A base model with adapters on it by name, all from directories; the last is active.

    A head that an adapter holds sets the number of labels, and embeddings that of tokens, whatever the config says.
    """
    config = read_base_config(base)
    if not adapters:
        return bare(load_base(base, task=task, dtype=dtype))
    folders = [folder for adapter in adapters.values() for folder in rule_folders(adapter)]
    configs = {folder: read_config(folder) for folder in folders}
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
    resize_vocabulary(model, weights.values())
    adapted = bare(model)
    for name, adapter in adapters.items():
        adapted.load_adapter(adapter, name)
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


def _refuse_output(base: Path, output: str | Path, adapters: Sequence[Path], force: bool) -> None:
    """Refuse at once what would be refused after minutes of work."""
    target = Path(output).resolve()
    inputs = [base.resolve(), *(adapter.resolve() for adapter in adapters)]
    if any(target == i or target in i.parents for i in inputs):
        raise PeftfxError("the output would replace an input", str(output), "choose another output directory")
    check_output(output, force)
    free = shutil.disk_usage(next(p for p in (target, *target.parents) if os.path.exists(p))).free
    needed = sum(p.stat().st_size for p in base.glob("*.safetensors")) if base.is_dir() else 0
    if needed > free:
        raise PeftfxError(
            f"{free:,} bytes are free, {needed:,} are needed", str(output), "free space, or choose another disk"
        )
