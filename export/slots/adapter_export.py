"""Write the active adapters of a model to an `.onnx_adapter` file, for an exported graph that has slots.

`adapter_tensors.py` computes the tensors and their places. This module lays them out as the slots of a graph need them,
writes the file and verifies it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from torch import Tensor

from peftfx.bases.config_fields import vocabulary_of
from peftfx.bases.processors.pictures import pictures_of
from peftfx.bases.processors.videos import with_videos
from peftfx.bases.transformers_config import read_config
from peftfx.errors import PeftfxError, listed, shown, warn
from peftfx.export.deployment.serving_mode import in_eval
from peftfx.export.slots.adapter_check import check_adapter, in_slot_dtypes
from peftfx.export.slots.adapter_tensors import adapter_tensors
from peftfx.export.slots.initializers import untied_heads
from peftfx.export.slots.served_as import idle_in, pictured
from peftfx.export.writing.atomic_directory import publish
from peftfx.export_options.adapter import AdapterChanges, AdapterOptions
from peftfx.export_options.checked import takes
from peftfx.files import already_there, folder_of, is_file, is_folder, write_file, writing
from peftfx.graph.fingerprint import fingerprint
from peftfx.graph.graph import BASE
from peftfx.graph.slots import (
    INNER,
    KEYS,
    OUTER,
    PREFIX,
    SLOT_A,
    SLOT_B,
    SLOT_OWN,
    SLOT_PROMPT,
    VALUES,
    Manifest,
    Slot,
)
from peftfx.model.adapted import AdaptedModel
from peftfx.options import DECODE
from peftfx.serving.adapter_file import (
    SUFFIX,
    file_of,
    holds_adapter,
    is_adapter_file,
    write_adapter_file,
)
from peftfx.views.images.videos import VIDEO

_WORDS = {
    SLOT_A: "a low-rank sum at",
    SLOT_B: "a low-rank sum at",
    OUTER: "a scale of the output of",
    INNER: "a scale of the input of",
    SLOT_OWN: "a trained copy of",
    KEYS: "keys and values beside",
    VALUES: "keys and values beside",
    SLOT_PROMPT: "a soft prompt",
    PREFIX: "a soft prompt",
}


@takes(AdapterOptions)
def export_adapter(
    adapted: AdaptedModel,
    directory: str | Path,
    output: str | Path,
    options: AdapterOptions | None = None,
    **changes: Unpack[AdapterChanges],
) -> Path:
    """Write the active adapters as one `.onnx_adapter` for the exported graph in a directory.

    The result is a file. For several graphs, as those of an encoder-decoder or of a model of text and images, it is a
    directory with a file for each graph.

    Before the result appears, the graph is run with it in ONNX Runtime and compared with torch, at sizes that no
    capture saw.

    Args:
        adapted: the base that the graph was exported from, with the adapters on it.
        directory: the directory that `peftfx export --swappable` wrote.
        output: the path to write. The suffix `.onnx_adapter` is added if it is missing.
        options: see `AdapterOptions`. Options can be given by name as well, for example `check=False`.
        changes: options by name; they override the same fields of `options`.

    Raises:
        PeftfxError: the graph is of another base, or has no slot for something that an adapter does.
        VerificationError: ONNX Runtime and torch disagree; no file is left.

    Examples:
        >>> report = peftfx.export_onnx(model, "graph", slots="attention", view="forward")
        >>> path = peftfx.export_adapter(peftfx.load(model, "adapter"), "graph", "adapter.onnx_adapter")
    """
    if not isinstance(adapted, AdaptedModel):
        hint = "pass what peftfx.load(model, directory) gives; for directories there is peftfx export-adapter"
        raise PeftfxError(f"not an adapted model: {shown(adapted)}", "adapted", hint)
    asked, adapted = AdapterOptions.of(options, changes), adapted.floating()
    directory, output = Path(directory), adapter_path(Path(output), asked.force)
    manifest = Manifest.read(directory)
    if asked.atol is not None or asked.rtol is not None:
        manifest = dataclasses.replace(manifest, atol=asked.atol, rtol=asked.rtol)
    if fingerprint(adapted.base, manifest.fingerprint_version) != manifest.fingerprint:
        raise _of_another_base(adapted, directory, manifest)
    picture, example = pictured(adapted, manifest)
    with pictures_of(picture), with_videos(VIDEO in manifest.views.values()):
        with in_eval(adapted):
            tensors = slot_tensors(adapted, manifest, idle_in(adapted, directory, manifest))
        write = functools.partial(_write_checked, adapted, directory, manifest, tensors, asked.check, example)
        if len(manifest.views) > 1:
            with publish(output, asked.force, functools.partial(_of_adapter, tuple(manifest.views))) as temporary:
                write(temporary)
            return output
        if is_folder(output):
            hint = "delete it yourself, or choose another output"
            raise PeftfxError(
                "there is an adapter for several graphs, and this one is for one graph", str(output), hint
            )
        with writing(output), folder_of(output):
            write_file(output, write, replace=asked.force)
    return output


def _of_another_base(adapted: AdaptedModel, directory: Path, manifest: Manifest) -> PeftfxError:
    """Return the error for a graph whose base has other weights than the one here."""
    what = f"the graph here is of another base ({manifest.model} from {manifest.base or 'memory'})"
    here = vocabulary_of(getattr(adapted.base, "config", None))
    there = vocabulary_of(read_config(directory)) if here is not None and is_file(directory / "config.json") else here
    if there != here:
        what += f": that has {there} tokens, and the base here has {here}"
        hint = "save the base that has the adapter's tokens (resize_token_embeddings, save_pretrained), and export that"
        return PeftfxError(what, str(directory), hint)
    return PeftfxError(what, str(directory), "give the base that it was exported from, or export this one")


def _of_adapter(graphs: tuple[str, ...], directory: Path) -> list[str] | None:
    """Return the files of an adapter for several graphs; None if the directory is none."""
    return [file_of(directory, graph, graphs).name for graph in graphs] if holds_adapter(directory) else None


def adapter_path(output: Path, force: bool) -> Path:
    """Return the path that an adapter will have: `output`, with the suffix `.onnx_adapter`.

    Raises:
        PeftfxError: the path has no file name; or the file exists, and `force` is not set or the file is not an
            adapter.
    """
    if output.name in ("", ".."):
        raise PeftfxError(
            "the output path has no file name", str(output), "name the file to make, as in --output french"
        )
    output = output if output.suffix == SUFFIX else output.with_name(output.name + SUFFIX)
    if os.path.lexists(output) and not force:
        raise already_there(output)
    if os.path.lexists(output) and not (is_adapter_file(output) or holds_adapter(output)):
        hint = "delete it yourself, or choose another output"
        raise PeftfxError("the file there is not an adapter file, so it is not replaced", str(output), hint)
    return output


def _write_checked(
    adapted: AdaptedModel,
    directory: Path,
    manifest: Manifest,
    tensors: Mapping[str, Mapping[str, Tensor]],
    check: bool,
    example: Mapping[str, object] | None,
    path: Path,
) -> None:
    for name in manifest.views:
        laid = in_slot_dtypes(tensors[name], manifest.of(name))
        write_adapter_file(laid, manifest.version, file_of(path, name, tuple(manifest.views)))
    for name in manifest.views if check else ():
        with in_eval(adapted):
            check_adapter(adapted, directory, manifest, name, tensors[name], example, path)


def slot_tensors(adapted: AdaptedModel, manifest: Manifest, idle: Collection[str] = ()) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that the active adapters put into slots, by graph and slot name. Unused slots are left out.

    They are not rounded to the dtypes of the slots yet.

    Args:
        adapted: the model with the adapters.
        manifest: the slots of the graphs.
        idle: the paths of layers that no graph runs. What adapters do there changes nothing; a warning tells it.

    Raises:
        PeftfxError: some tensors have no slot; all of them are listed.
    """
    if not adapted.active:
        raise PeftfxError("no adapter is active", "export_adapter", "load one, or make one active (set_adapter)")
    slots = manifest.by_place()
    found: dict[str, dict[str, Tensor]] = {graph: {} for graph in manifest.views}
    homeless: dict[str, list[str]] = {}
    unused: dict[str, None] = {}
    for (at, what), value in adapter_tensors(adapted, decodes=DECODE in manifest.views.values()).items():
        if at in idle:
            unused.setdefault(at)
            continue
        laid = [(slot, _laid(value, slot)) for slot in slots.get((at, what), ())]
        if not laid or any(fitting is None for _, fitting in laid):
            homeless.setdefault(what, []).append(at)
        for slot, fitting in laid:
            found[slot.graph] |= {} if fitting is None else {slot.name: fitting}
    if homeless:
        told: dict[str, dict[str, None]] = {}
        for what, places in homeless.items():
            told.setdefault(_WORDS[what], {}).update(dict.fromkeys(places))
        lines = "; ".join(f"{words} {listed(list(paths))}".strip() for words, paths in told.items())
        roles = _roles(adapted, homeless)
        target = f" ('{' | '.join(('all-linear', *roles))}')" if roles else ""
        hint = f"export the base with --slots that pick these sites{target}, or export the adapter merged"
        hint = hint if _may_have_slots(adapted, homeless) else "export the adapter merged"
        raise PeftfxError(f"the graph has no place for {lines}", manifest.model, hint)
    if unused:
        warn(f"the graph does not run these modules, so the adapter does nothing there: {listed(list(unused))}")
    return found


def _may_have_slots(adapted: AdaptedModel, homeless: Mapping[str, Sequence[str]]) -> bool:
    """Say whether a graph could have slots for these tensors: no weight is replaced by a trained copy but a head's."""
    kept = {site.bias for site in adapted.sites.weights} | {site.weight for site in untied_heads(adapted.sites)}
    own = all(f"{BASE}.{name}" in kept for name in homeless.get(SLOT_OWN, ()))
    return own and not homeless.keys() <= {SLOT_PROMPT, PREFIX}


def _roles(adapted: AdaptedModel, homeless: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the roles of the sites of these tensors, as a target of slots names them."""
    names = {f"{BASE}.{name}" for places in homeless.values() for name in places}
    found = (s.role for s in adapted.sites.weights if names & {f"{BASE}.{s.path}", s.weight, s.bias})
    return sorted(dict.fromkeys(found))


def _laid(value: Tensor, slot: Slot) -> Tensor | None:
    """Return a tensor in the layout of its slot, or None if it does not fit."""
    laid = value.permute(slot.perm) if slot.perm and len(slot.perm) == value.ndim else value
    return laid.detach().contiguous().cpu() if slot.takes(tuple(laid.shape)) else None
