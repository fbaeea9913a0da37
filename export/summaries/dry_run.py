"""Say what an export would write, from configs and file sizes alone. No graph is captured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.exporters.base import EXPORT_MANIFEST_FILE

from peftfx.bases.files.gguf import as_directory
from peftfx.bases.load import load_base
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.processors.videos import with_videos
from peftfx.bases.sentences.modules import SentenceModules, transformer_folder
from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError, how_many
from peftfx.export.assets import assets_of
from peftfx.export.command import refuse_output
from peftfx.export.deployment import genai_config
from peftfx.export.deployment.image_size import chosen_picture
from peftfx.export.deployment.parts import generates, views_of
from peftfx.export.directories import TORCH_DTYPES, sentence_task, served_dtype
from peftfx.export.writing.memory import memory_needed, refuse_memory
from peftfx.export_options.directory import DirectoryOptions
from peftfx.formats import REPORT
from peftfx.options import AUTO, DECODE, FORWARD
from peftfx.rules.peft_files import CONFIG, Weights, read_adapter_config, rule_folders
from peftfx.rules.text import write_rule
from peftfx.rules.tied_copies import method_of_file
from peftfx.views.finding.named_views import find_view

_PACE = (30e6, 300e6)  #: bytes of weights per second over all stages: on a slow machine, and on a fast one
_START = (5.0, 60.0)  #: seconds besides the weights: for a small model, and for a model of many layers


@dataclass(frozen=True)
class DryRun:
    """The files that an export would write, and the cost of the export.

    Attributes:
        output: the directory to write.
        model: the class of the base.
        adapters: the rules of the adapters, by name.
        views: the views that would be exported.
        files: the names of the files, and the bytes of the weights' file.
        dtype: the dtype of the weights.
        parameters: the number of parameters of the base.
        memory: the bytes of memory that the export would need, without mapped files.
        seconds: the shortest and the longest time that the export may take.
        notes: what only the export itself can tell.
    """

    output: str
    model: str
    adapters: Mapping[str, str]
    views: tuple[str, ...]
    files: Mapping[str, int | None]
    dtype: str
    parameters: int
    memory: int
    seconds: tuple[float, float]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        files = ", ".join(name if size is None else f"{name} about {size:,} B" for name, size in self.files.items())
        adapters = "; ".join(f"{name}: {rule}" for name, rule in self.adapters.items()) or "none"
        rows = [
            ("model", f"{self.model}, {self.parameters:,} parameters"),
            ("adapters", adapters),
            ("views", ", ".join(self.views)),
            ("dtype", self.dtype),
            ("files", files),
            ("memory", f"{self.memory / 1e9:.1f} GB, without mapped files"),
            ("time", f"{self.seconds[0]:.0f} to {self.seconds[1]:.0f} s"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join([f"would write {self.output}; nothing was written", *(f"  {n:8}  {t}" for n, t in rows)])


def dry_run(base: Path, output: Path, asked: DirectoryOptions) -> DryRun:
    """Say what `export_directory` would do with `base`, `output` and the options `asked`, without doing it.

    Raises:
        PeftfxError: for what an export refuses before capture: the output exists, files are missing or broken, too
            little memory is allowed, or the model has no such view.
    """
    refuse_output(base, output, list(asked.folders.values()), asked.force)
    with as_directory(base) as directory:
        sentences = SentenceModules.found([*reversed(asked.folders.values()), directory])
        home = transformer_folder(directory)
        kept = served_dtype(home, asked.dtype, asked.quantize_base)
        with torch.device("meta"):
            task = sentence_task(asked.task, None, sentences, directory)
            model = load_base(home, task=task, weights=False, dtype=kept)
        refuse_memory(model, asked.memory)
        adapters = {name: _rules(folder) for name, folder in asked.folders.items()}
        with _on_cpu(model), pictures_of(chosen_picture(model, asked.images, asked.view)), with_videos(asked.videos):
            parts = _views(model, asked.view)
        views, files = tuple(parts.values()), dict[str, int | None].fromkeys(parts)
        unique = {id(p): p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
        sizes = [p.numel() * (kept or p.dtype).itemsize for p in unique.values()]
        total = sum(sizes)
        files["model.onnx.data"] = total
        manifests: dict[tuple[str, ...], str] = {(DECODE,): genai_config.GENAI_CONFIG, (FORWARD,): EXPORT_MANIFEST_FILE}
        manifest = manifests.get(views)
        configs = ["config.json", *(["generation_config.json"] if views != (FORWARD,) else [])]
        own = dict.fromkeys(name for folder in (*asked.folders.values(), home) for name in assets_of(folder))
        files |= dict.fromkeys((*own, *configs, *([manifest] if manifest else []), REPORT))
        dtype = kept or next((p.dtype for p in unique.values()), torch.float32)
        seconds = total / _PACE[1] + _START[0], total / _PACE[0] + _START[1]
        count = sum(p.numel() for p in model.parameters())
        return DryRun(
            *(str(output), type(model).__name__, adapters, views, files, _name(dtype), count),
            memory=memory_needed(model),
            seconds=seconds,
            notes=tuple(_notes(asked)),
        )


def _rules(folder: Path) -> str:
    rules = []
    for own in rule_folders(folder):
        method = method_of_file(read_adapter_config(own), str(own / CONFIG))
        weights = Weights(own, method.prefix)
        rules.append(f"{write_rule(method)}, {how_many(len(weights.names), 'tensor')}")
    return "; ".join(rules)


def _views(model: nn.Module, asked: str) -> dict[str, str]:
    """Return the files of the graphs, and the view in each."""
    if asked == FORWARD or (asked == AUTO and not generates(model)):
        return {"model.onnx": FORWARD}
    if not encodes_and_decodes(model):
        try:
            find_view(model, DECODE)
        except PeftfxError:
            if asked == DECODE:
                raise
            return {"model.onnx": FORWARD}
    return views_of(model, DECODE, None)


@contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Put fake tensors on the CPU, where inputs are, in the place of a model's meta tensors inside the context."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    made: dict[int, torch.Tensor] = {}
    found = [(own, n, t) for m in model.modules() for own in (m._parameters, m._buffers) for n, t in own.items()]
    held = [(own, name, tensor) for own, name, tensor in found if tensor is not None and tensor.is_meta]
    for own, name, tensor in held:
        if id(tensor) not in made:
            with mode, torch.device("cpu"):
                value = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
        own[name] = made[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for own, name, tensor in held:
            own[name] = tensor  # type: ignore[assignment]


def _notes(asked: DirectoryOptions) -> list[str]:
    notes = [
        "only an export shows whether the model can be captured and the adapter fits, and what memory the graph needs"
    ]
    if asked.quantize is not None:
        notes.append("the bytes are ahead of quantisation")
    if asked.slots is not None or asked.batched:
        notes.append("places for adapters are not counted")
    return notes


def _name(dtype: torch.dtype) -> str:
    return next((name for name, own in TORCH_DTYPES.items() if own == dtype), str(dtype))
