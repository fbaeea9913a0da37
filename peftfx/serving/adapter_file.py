"""`.onnx_adapter` files, ONNX Runtime's own format: named tensors, and the number of the base that they are for.

ONNX Runtime refuses a file with a tensor that a graph has no input for. So for a model of several graphs an adapter is
a directory, with a file for each.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnxruntime as ort
from torch import Tensor

from peftfx.errors import PeftfxError, first_line
from peftfx.files import is_file, is_folder
from peftfx.formats import ADAPTER, VERSIONS, refuse_newer
from peftfx.graph.slots import SLOTS_FILE, Manifest, listed
from peftfx.serving.onnx_model import to_ort, to_torch

SUFFIX = ADAPTER
_MARK = b"TORT"  #: of the format, behind a file's first four bytes


def read_adapter_file(path: Path) -> tuple[int, dict[str, ort.OrtValue]]:
    """The number of the base that an `.onnx_adapter` file is for, and its tensors.

    Raises:
        PeftfxError: there is no such file, or it is not one.
    """
    if not is_file(path):
        raise PeftfxError("there is no such adapter", str(path), "`peftfx export-adapter` writes one")
    try:
        read = ort.AdapterFormat.read_adapter(str(path))
        # Copied: what the file's own memory holds goes with the object that read it.
        values = {name: to_ort(to_torch(value).clone()) for name, value in read.get_parameters().items()}
    except Exception as error:
        raise PeftfxError(f"cannot be read: {first_line(error)}", str(path), "write it again") from error
    refuse_newer(read.get_adapter_version(), ADAPTER, path, "write it again")
    return int(read.get_model_version()), values


def is_adapter_file(path: Path) -> bool:
    """Whether this is an `.onnx_adapter` file, and no link to one."""
    if os.path.islink(path) or not is_file(path):
        return False
    with path.open("rb") as file:
        return file.read(8)[4:] == _MARK


def holds_adapter(directory: Path) -> bool:
    """Whether this is a directory of `.onnx_adapter` files and of nothing else."""
    return is_folder(directory) and not os.path.islink(directory) and all(map(is_adapter_file, directory.iterdir()))


def read_for(path: Path, directory: Path, served: Collection[str] = ()) -> dict[str, dict[str, ort.OrtValue]]:
    """The tensors of an `.onnx_adapter` for the graphs in a directory, by the graphs' names.

    Args:
        served: the graphs that the model runs: each must be one of those that the directory lists.

    Raises:
        PeftfxError: the graphs have no slots, or the adapter is for another base or has what fits into none of them.
    """
    manifest = Manifest.read(directory)
    graphs = tuple(manifest.views)
    if unlisted := sorted(set(served) - set(graphs)):
        what = f"it lists no graph {unlisted[0]!r}, which the model runs"
        raise PeftfxError(what, str(directory / SLOTS_FILE), "export the base again")
    if len(graphs) > 1 and is_file(path):
        hint = "write it for this model: peftfx export-adapter --for"
        raise PeftfxError(f"the model is {len(graphs)} graphs, and this is a file for one", str(path), hint)
    return {graph: _fitting(file_of(path, graph, graphs), manifest, graph) for graph in graphs}


def file_of(path: Path, graph: str, graphs: Sequence[str]) -> Path:
    """The file for one graph of an adapter for these."""
    return path / f"{graph}{SUFFIX}" if len(graphs) > 1 else path


def _fitting(path: Path, manifest: Manifest, graph: str) -> dict[str, ort.OrtValue]:
    version, values = read_adapter_file(path)
    if version != manifest.version:
        hint = "write it for this graph: peftfx export-adapter --for"
        raise PeftfxError(f"this adapter is for another base than {manifest.model} here", str(path), hint)
    slots = manifest.of(graph)
    unfit = [n for n, value in values.items() if n not in slots or not slots[n].takes(tuple(value.shape()))]
    if unfit:
        hint = "write it for this graph: peftfx export-adapter --for"
        raise PeftfxError(f"the graph has no slots for {listed(unfit)}", str(path), hint)
    return values


def write_adapter_file(tensors: Mapping[str, Tensor], version: int, path: Path) -> None:
    """Write an `.onnx_adapter` file for the base of this number."""
    values = {name: to_ort(tensor) for name, tensor in tensors.items()}
    made = ort.AdapterFormat()
    made.set_adapter_version(VERSIONS[ADAPTER])
    made.set_model_version(version)
    made.set_parameters(values)
    made.export_adapter(str(path))
    del values  # not before: ONNX Runtime reads them where they are
