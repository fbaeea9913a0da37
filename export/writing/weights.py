"""Write an ONNX model as `model.onnx` and `model.onnx.data`, with one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from peftfx.errors import PeftfxError
from peftfx.export.metadata import PERM, PIECES, SOURCE
from peftfx.export.writing.digest import Digest
from peftfx.export.writing.finite import refuse_infinite
from peftfx.export.writing.stream import Stream
from peftfx.files import writing
from peftfx.memory.pages import PAGE
from peftfx.serving.data_file import DATA_KEY, data_end, told_data

INLINE = 1024  #: bytes up to which an initializer is kept inside `model.onnx`
LARGE = 65536  #: bytes from which a tensor starts on a page of its own, so that it can be memory-mapped
_LIMIT = 2**31 - 1  #: protobuf's limit, in bytes

Written = Callable[[int, int], object]
"""A function that is called with the bytes written so far, and the total."""


@dataclass(frozen=True)
class _Place:
    """The place of a tensor's bytes in the data file."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int
    shared: bool = False  #: the bytes also belong to another model, and are written with it

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

    Initializers larger than `external_threshold` bytes go to `<name>.data` beside it. Each is evaluated when it is
    written, and then released. `written` is called with the bytes written so far, and the total. The location in the
    file is relative, so the directory can be moved. The model is not changed. Call this inside `publish`, so that no
    half-written file is left.

    Raises:
        PeftfxError: the disk refuses or is too small, or the graph with its inline tensors is over 2 GB.
    """
    save_together({name: model}, directory, f"{name}.data", external_threshold, written)
    return Path(directory) / name


def save_together(
    models: Mapping[str, ir.Model],
    directory: Path,
    data: str = "model.onnx.data",
    external_threshold: int = INLINE,
    written: Written | None = None,
    infinite: Collection[str] | None = None,
) -> None:
    """Write models, by the names of their files, with one shared file of weights. Shared weights are there once.

    The other arguments are those of `save`. `infinite` has the sources of tensors of the model that may hold an
    infinity, such as a mask; with None, tensors are not checked.

    Raises:
        PeftfxError: for the reasons of `save`, or a tensor holds NaN, or an infinity that is not allowed.
    """
    path = Path(directory) / data
    places = list(_layout(models.values(), external_threshold))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(max((place.end for place in places), default=0), path.parent)
        told = {}
        if places:
            digest = _write(places, path, written or (lambda done, total: None), infinite)
            told[DATA_KEY] = told_data(digest, data)
        for value in _inline(models.values(), external_threshold):
            assert value.const_value is not None
            read = value.const_value.numpy()
            refuse_infinite(value, torch.from_numpy(read.copy()), infinite)
            value.const_value = ir.Tensor(read, dtype=value.const_value.dtype, name=value.const_value.name)
        with _external(places, data, path.parent), _telling(models.values(), told):
            for name, model in models.items():
                if _inline_size(model) > _LIMIT:
                    what, hint = "the model's graph is over protobuf's 2 GB", "lower external_threshold"
                    raise PeftfxError(what, str(path.with_name(name)), hint)
                ir.save(model, path.with_name(name))


def _inline_size(model: ir.Model) -> int:
    tensors = [v.const_value for v in model.graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))


def _layout(models: Iterable[ir.Model], threshold: int) -> Iterator[_Place]:
    offset = 0
    known: dict[object, _Place] = {}
    for value in chain.from_iterable(model.graph.initializers.values() for model in models):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= threshold:
            continue
        if (content := content_of(value)) in known:
            yield _Place(value, tensor, known[content].offset, shared=True)
            continue
        if tensor.nbytes >= LARGE:
            offset += -offset % PAGE
        place = known[content] = _Place(value, tensor, offset)
        offset = place.end
        yield place


def content_of(value: ir.Value) -> object:
    """Return an object that is equal for weights with equal content: read from one source, stored in one layout."""
    source = value.meta.get(SOURCE)
    return value if source is None else (source, value.metadata_props.get(PERM), value.dtype, str(value.shape))


def refuse_full_disk(needed: int, directory: Path) -> None:
    """Refuse to write more bytes than the directory's disk has free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        what = f"{needed:,} bytes are needed, {free:,} are free"
        raise PeftfxError(what, str(directory), "free some space, or choose a directory on another disk")


def _inline(models: Iterable[ir.Model], threshold: int) -> Iterator[ir.Value]:
    """Yield the small tensors of plain floats."""
    plain = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    for value in chain.from_iterable(model.graph.initializers.values() for model in models):
        if value.const_value is not None and value.const_value.nbytes <= threshold and value.dtype in plain:
            yield value


def _write(places: Sequence[_Place], path: Path, written: Written, infinite: Collection[str] | None) -> str:
    """Write the tensors, and the digest at the end. Return the digest."""
    own = [place for place in places if not place.shared]
    total, digest = own[-1].end, Digest()
    with Stream(path) as stream:
        for place in own:
            stream.pad(place.offset)
            for part in _bytes(place, infinite):
                digest.update(part)
                stream.write(part)
            written(place.end, total)
        stream.write(memoryview(data_end(digest.hexdigest())))
    return digest.hexdigest()


def _bytes(place: _Place, infinite: Collection[str] | None) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, one part after another."""
    tensor = place.tensor
    if PIECES in tensor.meta:
        parts = tensor.meta[PIECES]()
    else:
        raw = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
        if not isinstance(raw, TorchTensor):
            yield memoryview(raw.tobytes())
            return
        parts = iter([raw.raw])
    for part in parts:
        value = part.detach().cpu().contiguous()
        refuse_infinite(place.value, value, infinite)
        yield memoryview(value.reshape(-1).view(torch.uint8).numpy())


@contextmanager
def _telling(models: Iterable[ir.Model], told: Mapping[str, str]) -> Iterator[None]:
    """Add metadata to models while this context lasts."""
    before = [(model, dict(model.metadata_props)) for model in models]
    for model, _ in before:
        model.metadata_props.update(told)
    try:
        yield
    finally:
        for model, props in before:
            model.metadata_props.clear()
            model.metadata_props.update(props)


@contextmanager
def _external(places: Sequence[_Place], location: str, directory: Path) -> Iterator[None]:
    """Make the placed tensors references into the data file while this context lasts."""
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
