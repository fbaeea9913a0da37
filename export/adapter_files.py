"""`.onnx_adapter` files, ONNX Runtime's own format: named tensors, and the number of the base that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort
from torch import Tensor

from peftfx.errors import PeftfxError, first_line
from peftfx.export.runtime import to_ort, to_torch
from peftfx.slots import Manifest, listed

SUFFIX = ".onnx_adapter"
VERSION = 1  #: of the format


def read_adapter_file(path: Path) -> tuple[int, dict[str, ort.OrtValue]]:
    """The number of the base that an `.onnx_adapter` file is for, and its tensors.

    Raises:
        PeftfxError: there is no such file, or it is not one.
    """
    if not path.is_file():
        raise PeftfxError("there is no such adapter", str(path), "`peftfx export-adapter` writes one")
    try:
        read = ort.AdapterFormat.read_adapter(str(path))
        # Copied: what the file's own memory holds goes with the object that read it.
        values = {name: to_ort(to_torch(value).clone()) for name, value in read.get_parameters().items()}
    except Exception as error:
        raise PeftfxError(f"cannot be read: {first_line(error)}", str(path), "write it again") from error
    return int(read.get_model_version()), values


def read_for(path: Path, directory: Path) -> dict[str, ort.OrtValue]:
    """The tensors of an `.onnx_adapter` file, for the graph in a directory.

    Raises:
        PeftfxError: the graph has no slots, or the adapter is for another base or has what fits into none of them.
    """
    manifest = Manifest.read(directory)
    version, values = read_adapter_file(path)
    if version != manifest.version:
        hint = "write it for this graph: peftfx export-adapter --for"
        raise PeftfxError(f"this adapter is for another base than {manifest.model} here", str(path), hint)
    slots = {slot.name: slot for slot in manifest.slots}
    unfit = [n for n, value in values.items() if n not in slots or not slots[n].takes(tuple(value.shape()))]
    if unfit:
        hint = "write it for this graph: peftfx export-adapter --for"
        raise PeftfxError(f"the graph has no slots for {listed(unfit)}", str(path), hint)
    return values


def write_adapter_file(tensors: Mapping[str, Tensor], version: int, path: Path) -> None:
    """Write an `.onnx_adapter` file for the base of this number."""
    values = {name: to_ort(tensor) for name, tensor in tensors.items()}
    made = ort.AdapterFormat()
    made.set_adapter_version(VERSION)
    made.set_model_version(version)
    made.set_parameters(values)
    made.export_adapter(str(path))
    del values  # not before: ONNX Runtime reads them where they are
