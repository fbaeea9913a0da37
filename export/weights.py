"""save: an ONNX model becomes `model.onnx` and `model.onnx.data`, one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from peftfx.errors import PeftfxError
from peftfx.export.stream import PAGE, Stream
from peftfx.files import writing

INLINE = 1024  #: bytes up to which an initializer is kept inside `model.onnx`
LARGE = 65536  #: bytes from which a tensor starts on a page of its own, so that it can be memory-mapped
_LIMIT = 2**31 - 1  #: bytes, protobuf's

Written = Callable[[int, int], object]
"""Called with the bytes written so far, and those there will be."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are in the data file."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.tensor.nbytes


def save(
    model: ir.Model,
    directory: Path,
    name: str = "model.onnx",
    external_threshold: int = INLINE,
    written: Written | None = None,
) -> Path:
    """Write `model` into `directory` and return the path of its `.onnx` file.

    Initializers larger than `external_threshold` bytes go to `<name>.data` beside it, each evaluated when its turn to
    be written comes and released after; the location in the file is relative, so the directory can be moved. The
    model is left as it was. Use it inside `publish`, so that nothing half-written stays behind.

    Raises:
        PeftfxError: the disk refuses or has not the room, or the model is too large for its inline tensors (2 GB).
    """
    path = Path(directory) / name
    places = list(_layout(model, external_threshold))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(places, path.parent)
        if places:
            _write(places, path.with_name(f"{name}.data"), written or (lambda done, total: None))
        with _external(places, f"{name}.data", path.parent):
            if _inline_size(model) > _LIMIT:
                raise PeftfxError("the model's graph is over protobuf's 2 GB", str(path), "lower external_threshold")
            ir.save(model, path)
    return path


def _inline_size(model: ir.Model) -> int:
    tensors = [v.const_value for v in model.graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))


def _layout(model: ir.Model, threshold: int) -> Iterator[_Place]:
    offset = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= threshold:
            continue
        if tensor.nbytes >= LARGE:
            offset += -offset % PAGE
        place = _Place(value, tensor, offset)
        offset = place.end
        yield place


def _refuse_full_disk(places: Sequence[_Place], directory: Path) -> None:
    needed, free = places[-1].end if places else 0, shutil.disk_usage(directory).free
    if needed > free:
        what = f"{needed:,} bytes are needed, {free:,} are free"
        raise PeftfxError(what, str(directory), "free some space, or choose a directory on another disk")


def _write(places: Sequence[_Place], path: Path, written: Written) -> None:
    total = places[-1].end
    with Stream(path) as stream:
        for place in places:
            stream.pad(place.offset)
            stream.write(_bytes(place.tensor))
            written(place.end, total)


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    raw = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
    if isinstance(raw, TorchTensor):
        value = raw.raw.detach().cpu().contiguous()
        return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it has a buffer
    return memoryview(raw.tobytes())


@contextmanager
def _external(places: Sequence[_Place], location: str, directory: Path) -> Iterator[None]:
    """Inside, the placed tensors are references into the data file."""
    for place in places:
        place.value.const_value = ir.ExternalTensor(
            location,
            place.offset,
            place.tensor.nbytes,
            place.tensor.dtype,
            shape=place.tensor.shape,  # type: ignore[arg-type]
            name=str(place.value.name),
            base_dir=directory,
        )
    try:
        yield
    finally:
        for place in places:
            place.value.const_value = place.tensor
