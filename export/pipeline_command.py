"""Export a diffusion pipeline's directory: each of its models goes to a folder of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from peftfx.adapters.files.writer import write_rule_directory
from peftfx.adapters.single_files.keys import read_single_file
from peftfx.adapters.single_files.reading import as_peft
from peftfx.bases.latent_decoders import as_latent_decoder, decodes_latents
from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError
from peftfx.export.command import export_directory, refuse_output
from peftfx.export.directories import served_dtype
from peftfx.export.onnx_directory import export_onnx
from peftfx.export.reports.report import Report
from peftfx.export.stages import OnStage
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.earlier_output import FILES, files_in, listed_in
from peftfx.export_options.directory import DirectoryOptions
from peftfx.files import is_file, is_folder, read_json
from peftfx.formats import PIPELINE, with_version
from peftfx.model.api import bare
from peftfx.rules.peft_files import CONFIG, WEIGHTS

INDEX = "model_index.json"
_DECODER = "vae_decoder"
_LIBRARIES = ("transformers", "diffusers")
_FILES = ("pytorch_lora_weights.safetensors",)  #: the file name under which diffusers saves a LoRA in a directory
#: How kohya's keys of a part begin after `lora_`. In diffusers' files, keys begin with the part's own name.
_KOHYA: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("te_", "te1_"),
    "text_encoder_2": ("te2_",),
    "text_encoder_3": ("te3_",),
    "transformer": ("unet_", "transformer_"),
}


def is_pipeline(base: Path) -> bool:
    """Say whether `base` is the directory of a whole diffusers pipeline."""
    return is_file(base / INDEX)


def export_pipeline(
    base: Path, output: Path, asked: DirectoryOptions, progress: OnStage | None = None
) -> dict[str, Report]:
    """Export each model of a pipeline: the text encoders, the U-Net, and the decoder of the autoencoder.

    Args:
        base: the pipeline's directory, with `model_index.json` and a folder for each part.
        output: the directory to write: a folder for each model, and those of the scheduler and tokenizers. It appears
            only when it is complete.
        asked: the options, which apply to each model. The adapter is a file in kohya's or diffusers' format, or a
            directory with a folder in HF PEFT's format for each adapted model (`unet`, `text_encoder`, `vae`).
        progress: called with a line when a stage begins.

    Returns:
        The report of each model, by the name of its folder.

    Raises:
        PeftfxError: bad input, or a model that cannot be exported; VerificationError: ONNX Runtime and torch disagree.
            Either way no output is left.
    """
    if asked.batched or asked.slots is not None or asked.calibration is not None or asked.task is not None:
        what = "a pipeline's models are exported as they are, or with an adapter merged"
        hint = "export one of them alone for --batched, --swappable, --calibration or --task"
        raise PeftfxError(what, str(base), hint)
    source = None if asked.adapter is None else Path(asked.adapter)
    refuse_output(base, output, [] if source is None else [source], asked.force, _of_pipeline)
    parts, rest = _parts(base)
    say = progress or (lambda line: None)
    reports: dict[str, Report] = {}
    with publish(output, asked.force, _of_pipeline) as temporary, _adapters(source, base, parts) as adapters:
        for part in parts:
            own = replace(asked, adapter=adapters.get(part), force=False)
            try:
                model = load_base(base / part, weights=False)
                folder = _DECODER if decodes_latents(model) else part
                say(folder)
                reports[folder] = _export(base / part, temporary / folder, own, model, progress)
            except PeftfxError as error:
                raise type(error)(f"{part}: {error.what}", error.where, error.hint) from error
        for name in rest:
            shutil.copytree(base / name, temporary / name)
        shutil.copyfile(base / INDEX, temporary / INDEX)
        record = with_version(PIPELINE, {FILES: [*files_in(temporary), PIPELINE]})
        (temporary / PIPELINE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return reports


def _of_pipeline(directory: Path) -> Collection[str] | None:
    """Return the files that an export of a pipeline wrote into a directory; None if it is none."""
    return listed_in(directory, PIPELINE) if is_file(directory / PIPELINE) else None


def _parts(base: Path) -> tuple[list[str], list[str]]:
    """Return the folders of the models, and the other folders: tokenizers, schedulers, image processors."""
    listed = {
        name: value[0]
        for name, value in read_json(base / INDEX).items()
        if isinstance(value, list) and len(value) == 2 and is_folder(base / name) and Path(name).name == name
    }
    models = [
        name for name, library in listed.items() if library in _LIBRARIES and is_file(base / name / "config.json")
    ]
    if not models:
        raise PeftfxError("no model of transformers or diffusers is in it", str(base / INDEX), "download it again")
    configs = ("config.json", "diffusion_pytorch_model.safetensors", "model.safetensors")
    rest = [name for name in listed if name not in models and not any(is_file(base / name / c) for c in configs)]
    return models, rest


def _export(base: Path, output: Path, asked: DirectoryOptions, model: nn.Module, progress: OnStage | None) -> Report:
    if not decodes_latents(model):
        return export_directory(base, output, asked, progress=progress)
    loaded, inputs = as_latent_decoder(load_base(base, dtype=served_dtype(base, asked.dtype, asked.quantize_base)))
    adapted = bare(loaded, inputs, "graph")
    if asked.adapter is not None:
        adapted.load_adapter(asked.adapter, "default")

    def assets(directory: Path) -> None:
        shutil.copyfile(base / "config.json", directory / "config.json")

    return export_onnx(adapted, output, asked, inputs=inputs, source=base.resolve(), assets=assets, progress=progress)


@contextmanager
def _adapters(source: Path | None, base: Path, parts: list[str]) -> Iterator[dict[str, Path]]:
    """Yield HF PEFT directories by the part that each is for. Directories made from a single file are temporary.

    Raises:
        PeftfxError: the adapter is for none of the parts, or holds something that belongs to no part.
    """
    if source is None:
        yield {}
        return
    file = next((source / name for name in _FILES if is_file(source / name)), source)
    if is_folder(file):
        found = {part: source / part for part in parts if is_file(source / part / CONFIG)}
        others = [p.name for p in source.iterdir() if is_file(p / CONFIG) and p.name not in found]
        if not found or others:
            what = f"it has adapters for {', '.join(others)}" if others else "it has no adapter for any of the parts"
            raise PeftfxError(what, str(source), f"one folder for each of {', '.join(parts)}, in HF PEFT's format")
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="peftfx-pipeline-") as folder:
        yield dict(_split(file, base, parts, Path(folder)))


def _split(file: Path, base: Path, parts: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    tensors, metadata = read_single_file(file)
    left = dict(tensors)
    for part in parts:
        ahead = (f"{part}.", *(f"lora_{short}" for short in _KOHYA.get(part, (f"{part}_",))))
        own: dict[str, Tensor] = {name: left.pop(name) for name in list(left) if name.startswith(ahead)}
        if own:
            path = folder / f"{part}.safetensors"
            save_file(own, path, metadata=metadata)
            try:
                config, made = as_peft(path, load_base(base / part, weights=False))
            except PeftfxError as error:
                where = str(file) if error.where == str(path) else error.where
                raise type(error)(error.what, where, error.hint) from error
            (folder / part).mkdir()
            write_rule_directory(folder / part, config, {WEIGHTS: made})
            yield part, folder / part
    if left:
        what = f"{len(left)} tensors of it are of no part of the pipeline: {', '.join(sorted(left)[:3])}"
        raise PeftfxError(what, str(file), f"its parts are {', '.join(parts)}")
