"""The command `export-adapter`: put adapters into a file of their own, for an exported graph that has slots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch

from peftfx.adapters.files.base.vocabulary import resize_vocabulary
from peftfx.bases.load import load_base
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.sentences.encoder import as_sentence_encoder
from peftfx.bases.sentences.modules import SentenceModules
from peftfx.bases.tasks import PEFT_HEADS, PEFT_TASKS, task_of_class
from peftfx.errors import PeftfxError, how_many
from peftfx.export.deployment.serving_mode import in_eval
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export.slots.served_as import pictured, served_as
from peftfx.export.stages import OnStage
from peftfx.export.tensor_counts import Destination, count_tensors
from peftfx.export_options.adapter import AdapterDirectoryChanges, AdapterDirectoryOptions
from peftfx.export_options.checked import takes
from peftfx.files import is_folder
from peftfx.graph.slots import Manifest
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.options import CAT
from peftfx.rules.peft_files import CONFIG, Weights, read_adapter_config, rule_folders
from peftfx.rules.tied_copies import method_of_file


@takes(AdapterDirectoryOptions)
def export_adapter_directories(
    adapters: Sequence[str],
    graph: str | Path,
    output: str | Path,
    options: AdapterDirectoryOptions | None = None,
    *,
    progress: OnStage | None = None,
    **changes: Unpack[AdapterDirectoryChanges],
) -> Path:
    """Write HF PEFT directories as one `.onnx_adapter` file for a directory that was exported with slots.

    Args:
        adapters: directories. Their effects are summed, each multiplied by its weight if one is given: `DIR=0.5`.
        graph: the exported directory.
        output: the file.
        options: see `AdapterDirectoryOptions`. Options can be given by name as well.
        progress: called with a line when a stage begins.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: bad input; VerificationError: ONNX Runtime and torch disagree. Either way no file is left.
    """
    asked = AdapterDirectoryOptions.of(options, changes)
    say = progress or (lambda line: None)
    manifest = Manifest.read(Path(graph))
    source = Path(asked.base or manifest.base)
    if not (asked.base or manifest.base) or not is_folder(source):
        what = (
            f"the base model is not where it was: {manifest.base}"
            if manifest.base
            else "the export does not name its base"
        )
        raise PeftfxError(what, str(graph), "pass --base DIR")
    given = [_weighted(text) for text in adapters]
    if asked.combination != CAT and all(weight is None for _, weight in given):
        what = "a combination has no effect on adapters without weights"
        raise PeftfxError(what, "combination", "give each adapter a weight, as in --adapter DIR=1")
    for folder in (rule for adapter, _ in given for rule in rule_folders(adapter)):
        _refuse_head(folder, manifest.model)
    say("load")
    model = load_base(source, task=task_of_class(manifest.model), dtype=getattr(torch, manifest.dtype))
    resize_vocabulary(model, [_weights(rule) for adapter, _ in given for rule in rule_folders(adapter)])
    sentences = SentenceModules.found([Path(graph)])  # None unless the graph embeds sentences
    adapted = bare(model if sentences is None else as_sentence_encoder(model, sentences.build()), road="graph")
    names = [f"adapter_{i}" for i in range(len(given))]
    for name, (folder, _) in zip(names, given, strict=True):
        adapted.load_adapter(folder, name)
    if any(weight is not None for _, weight in given):
        weights = [1.0 if weight is None else weight for _, weight in given]
        adapted.add_weighted_adapter(names, weights, "weighted", asked.combination)
    else:
        adapted.set_adapter(names)
    say("write and verify" if asked.check else "write")
    made = export_adapter(adapted, graph, output, asked)
    say(_counted(adapted, Path(graph), manifest, names))
    return made


def _counted(adapted: AdaptedModel, directory: Path, manifest: Manifest, names: Sequence[str]) -> str:
    """Say in a line where the tensors of the adapters' files went, with a count for each destination."""
    picture, example = pictured(adapted, manifest)
    with pictures_of(picture), adapted.named.acting_as(tuple(names)), in_eval(adapted):
        graphs = [served_as(adapted, directory, name, kind, example)[1] for name, kind in manifest.views.items()]
    counts = count_tensors({name: adapted.adapter(name) for name in names}, graphs, Destination.SLOTS)
    went = ", ".join(f"{count} {place}" for place, count in counts.items())
    return f"{how_many(sum(counts.values()), 'tensor')} in the files: {went}"


def _refuse_head(folder: Path, model: str) -> None:
    """Refuse an adapter with a head for one task if the graph is of a model for another task."""
    kind, own = str(read_adapter_config(folder).get("task_type")), task_of_class(model)
    if kind in PEFT_HEADS and own not in (None, PEFT_TASKS[kind]):
        task = PEFT_TASKS[kind]
        what = f"this adapter brings a head for {task}, and the graph is of {model}, which has none"
        raise PeftfxError(what, str(folder), f"export a base that has one (--task {task}), or the adapter merged")


def _weights(folder: Path) -> Weights:
    """Return the tensors of the file in a rule's folder."""
    return Weights(folder, method_of_file(read_adapter_config(folder), str(folder / CONFIG)).prefix)


def _weighted(text: str) -> tuple[Path, float | None]:
    """Split `DIR=0.5` into the directory and its weight. The weight is None if the text has none."""
    folder, _, weight = text.rpartition("=")
    if not folder or os.path.exists(text):
        return Path(text), None
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise PeftfxError(f"not a weight: {weight!r}", text, "as in --adapter DIR=0.5") from None
