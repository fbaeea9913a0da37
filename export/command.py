"""The command `export`: read a base's directory and adapters' directories, and write an ONNX directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from peftfx.bases.files.gguf import as_directory
from peftfx.bases.processors.image_size import write_image_size
from peftfx.bases.sentences.encoder import embeds_sentences
from peftfx.bases.sentences.modules import ALL, SentenceModules, transformer_folder
from peftfx.errors import PeftfxError
from peftfx.export.assets import copy_assets, tell_links
from peftfx.export.deployment.image_size import chosen_picture
from peftfx.export.directories import load_directories, served_dtype
from peftfx.export.onnx_directory import export_onnx
from peftfx.export.reports.report import Report
from peftfx.export.stages import OnStage
from peftfx.export.writing.atomic_directory import check_output
from peftfx.export.writing.earlier_output import FilesOf, of_export, refuse_inputs
from peftfx.export.writing.weights import Written
from peftfx.export_options.checked import takes
from peftfx.export_options.directory import DirectoryChanges, DirectoryOptions
from peftfx.files import Snapshot, is_folder
from peftfx.passes.base import Pass
from peftfx.rules.peft_files import rule_folders


@takes(DirectoryOptions)
def export_directory(
    base: str | Path,
    output: str | Path,
    options: DirectoryOptions | None = None,
    *,
    progress: OnStage | None = None,
    written: Written | None = None,
    passes: Sequence[Pass] = (),
    **changes: Unpack[DirectoryChanges],
) -> Report:
    """Export a base model's directory, with or without HF PEFT adapters, to a directory for ONNX Runtime.

    Args:
        base: the base model's directory, or a GGUF file. The inputs are read in place; if a file changes during the
            export, this is an error.
        output: the directory to write. It appears only when it is complete.
        options: see `DirectoryOptions`. Options can be given by name as well, for example `view="decode"`.
        progress: called with a line when a stage begins.
        written: called with the bytes of weights written so far, and the total.
        passes: run on the merged graphs before their translation to ONNX, as in `export_onnx`.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: bad input; VerificationError: ONNX Runtime and torch disagree. Either way no output is left.
    """
    asked = DirectoryOptions.of(options, changes)
    refuse_output(Path(base), output, list(asked.folders.values()), asked.force)
    with as_directory(Path(base)) as directory:
        return _export(directory, output, asked, progress, written, passes)


def _export(
    base: Path,
    output: str | Path,
    asked: DirectoryOptions,
    progress: OnStage | None,
    written: Written | None,
    passes: Sequence[Pass],
) -> Report:
    folders = asked.folders
    say = progress or (lambda line: None)
    inputs = Snapshot(base, *(part for folder in folders.values() for part in (folder, *rule_folders(folder))))
    sentences = SentenceModules.found([*reversed(folders.values()), base])
    home = transformer_folder(base)
    kept = served_dtype(home, asked.dtype, asked.quantize_base)
    say("load" if kept is None else f"load in {str(kept).removeprefix('torch.')}")
    adapted = load_directories(
        home,
        folders,
        task=asked.task,
        dtype=kept,
        quantize_base=asked.quantize_base,
        sentences=sentences,
        task_id=asked.task_id,
        view=asked.view,
        sized=isinstance(asked.images, tuple),
        road="graph",  # no call runs the adapted modules here
    )
    for name in asked.batched:
        if adapted.tasks_of(name):
            adapted.split_tasks(name)
            adapted.remove(name)
    if asked.batched:
        asked = replace(asked, batched=dict.fromkeys(adapted.names(), ""))

    def assets(directory: Path) -> None:
        if sentences is not None and embeds_sentences(adapted.base):
            sentences.copy(directory)
        leave = () if sentences is None else ALL
        links = [
            link for own in reversed(folders.values()) for link in copy_assets(own, directory, "config.json", *leave)
        ]
        links += copy_assets(home, directory, *leave)  # after the adapters': an adapter's own tokenizer wins
        tell_links(links, say)
        if isinstance(asked.images, tuple) and not chosen_picture(adapted.base, asked.images, asked.view):
            write_image_size(directory, asked.images)
        inputs.check()

    return export_onnx(
        *(adapted, output, asked),
        source=home.resolve(),
        assets=assets,
        progress=progress,
        written=written,
        passes=passes,
    )


def refuse_output(
    base: Path, output: str | Path, adapters: Sequence[Path], force: bool, made: FilesOf = of_export
) -> None:
    """Refuse at once an output that would otherwise be refused after minutes of work."""
    target = Path(output).resolve()
    refuse_inputs(Path(output), [base, *adapters])
    check_output(output, force, made)
    free = shutil.disk_usage(next(p for p in (target, *target.parents) if os.path.exists(p))).free
    needed = sum(p.stat().st_size for p in base.glob("*.safetensors")) if is_folder(base) else 0
    if needed > free:
        raise PeftfxError(
            f"{free:,} bytes are free, {needed:,} are needed", str(output), "free space, or choose another disk"
        )
