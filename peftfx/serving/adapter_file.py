"""Read and write `.onnx_adapter` files, ONNX Runtime's format: named tensors, and the number of their base.

ONNX Runtime refuses a file with a tensor for which the graph has no input. If a model has several graphs, an adapter is
therefore a directory with a file for each graph.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnxruntime as ort
from torch import Tensor

from peftfx.errors import PeftfxError, first_line, listed
from peftfx.files import is_file, is_folder
from peftfx.formats import ADAPTER, VERSIONS, refuse_newer
from peftfx.graph.slots import SLOTS_FILE, Manifest
from peftfx.rules.peft_files import CONFIG
from peftfx.serving.onnx_model import to_ort, to_torch

SUFFIX = ADAPTER
_MARK = b"TORT"  #: the format's mark, after a file's first four bytes


def read_adapter_file(path: Path) -> tuple[int, dict[str, ort.OrtValue]]:
    """Read an `.onnx_adapter` file. Return the number of the base that it is for, and its tensors.

    Raises:
        PeftfxError: the file does not exist, or is not an adapter file.
    """
    _refuse_another(path)
    if not is_file(path):
        raise _missing(path)
    try:
        read = ort.AdapterFormat.read_adapter(str(path))
        # Copied, because the file's memory is freed with the object that read it.
        values = {name: to_ort(to_torch(value).clone()) for name, value in read.get_parameters().items()}
    except Exception as error:
        raise PeftfxError(
            f"this adapter file cannot be read: {first_line(error)}", str(path), "write it again"
        ) from error
    refuse_newer(read.get_adapter_version(), ADAPTER, path, "write it again")
    return int(read.get_model_version()), values


def is_adapter_file(path: Path) -> bool:
    """Say whether the path is an `.onnx_adapter` file, and not a link."""
    if os.path.islink(path) or not is_file(path):
        return False
    with path.open("rb") as file:
        return file.read(8)[4:] == _MARK


def holds_adapter(directory: Path) -> bool:
    """Say whether the path is a directory that has only `.onnx_adapter` files."""
    return is_folder(directory) and not os.path.islink(directory) and all(map(is_adapter_file, directory.iterdir()))


def adapter_files(path: Path) -> list[Path]:
    """Return the files of an `.onnx_adapter`: itself, or those of a directory, which has one for each graph."""
    return sorted(path.glob(f"*{SUFFIX}")) if is_folder(path) else [path]


def read_for(path: Path, directory: Path, served: Collection[str] = ()) -> dict[str, dict[str, ort.OrtValue]]:
    """Read the tensors of the `.onnx_adapter` at `path` for the graphs in a `directory`, by the graphs' names.

    Args:
        served: the graphs that the model runs. The directory's list of graphs must have each of them.

    Raises:
        PeftfxError: the graphs have no slots, the adapter is for another base, or one of its tensors fits no slot.
    """
    manifest = Manifest.read(directory)
    graphs = tuple(manifest.views)
    if unlisted := sorted(set(served) - set(graphs)):
        what = f"the list of graphs lacks {unlisted[0]!r}, which the model runs"
        raise PeftfxError(what, str(directory / SLOTS_FILE), "export the base again")
    if len(graphs) > 1 and is_file(path):
        hint = "write the adapter for this model: peftfx export-adapter --for"
        raise PeftfxError(f"the model has {len(graphs)} graphs, but this file is for one graph", str(path), hint)
    _refuse_another(path)
    if not path.exists():
        raise _missing(path)
    return {graph: _fitting(file_of(path, graph, graphs), manifest, graph) for graph in graphs}


def _refuse_another(path: Path) -> None:
    if is_file(path / CONFIG):
        hint = f"write it for this graph: peftfx export-adapter --adapter {path} --for GRAPH --output FILE"
        raise PeftfxError("this is an adapter in HF PEFT's format, not a file for a graph", str(path), hint)


def _missing(path: Path) -> PeftfxError:
    return PeftfxError("there is no such adapter", str(path), "`peftfx export-adapter` writes one")


def file_of(path: Path, graph: str, graphs: Sequence[str]) -> Path:
    """Return the file for one graph in an adapter for `graphs`."""
    return path / f"{graph}{SUFFIX}" if len(graphs) > 1 else path


def _fitting(path: Path, manifest: Manifest, graph: str) -> dict[str, ort.OrtValue]:
    version, values = read_adapter_file(path)
    if version != manifest.version:
        hint = "write the adapter for this graph: peftfx export-adapter --for"
        raise PeftfxError(
            f"this adapter is for another base, not for the {manifest.model} in this graph", str(path), hint
        )
    slots = manifest.of(graph)
    unfit = [n for n, value in values.items() if n not in slots or not slots[n].takes(tuple(value.shape()))]
    if unfit:
        hint = "write the adapter for this graph: peftfx export-adapter --for"
        raise PeftfxError(f"the graph has no slots for {listed(unfit)}", str(path), hint)
    return values


def write_adapter_file(tensors: Mapping[str, Tensor], version: int, path: Path) -> None:
    """Write an `.onnx_adapter` file for the base with the number `version`.

    Raises:
        PeftfxError: ONNX Runtime cannot write the file.
    """
    values = {name: to_ort(tensor) for name, tensor in tensors.items()}
    made = ort.AdapterFormat()
    made.set_adapter_version(VERSIONS[ADAPTER])
    made.set_model_version(version)
    made.set_parameters(values)
    try:
        made.export_adapter(str(path))
    except RuntimeError as error:  # a full disk, without the number of the system's error
        hint = "free some space, or choose a directory on another disk"
        raise PeftfxError("ONNX Runtime cannot write the adapter", str(path.parent), hint) from error
    del values  # only now: ONNX Runtime reads the tensors in place
