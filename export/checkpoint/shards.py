"""Write tensors to safetensors files, with an index, while only one tensor is in memory.

https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.export.writing.stream import Stream
from peftfx.export.writing.weights import Written, refuse_full_disk
from peftfx.files import writing

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_HEADER = {"__metadata__": {"format": "pt"}}


@dataclass(frozen=True)
class Content:
    """A tensor that will be written.

    Attributes:
        shape, dtype: the tensor's shape and dtype.
        make: computes the tensor when it is written.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """The tensor's size in a file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(contents: Mapping[str, Content], directory: Path, size: int, written: Written | None) -> None:
    """Write `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`.

    Args:
        contents: the tensors, by their names.
        directory: an existing directory.
        size: the most bytes of a file, unless one tensor alone has more.
        written: called with the bytes written so far, and the total; None for no call.

    Raises:
        PeftfxError: the disk refuses or is too small, a tensor holds NaN or an infinity, or a tensor has a dtype that
            the format lacks.
    """
    odd = next(
        (f"{n} is {str(c.dtype).removeprefix('torch.')}" for n, c in contents.items() if c.dtype not in _NAMES), ""
    )
    if odd:
        raise PeftfxError("safetensors has no such dtype", odd, "save this model by its own library")
    total = sum(content.nbytes for content in contents.values())
    refuse_full_disk(total, directory)
    plan = split_state_dict_into_shards_factory(
        contents,  # type: ignore[arg-type]  # only the sizes are read
        get_storage_size=lambda content: content.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=size,
    )
    done = 0
    for file, names in plan.filename_to_tensors.items():
        own = {name: contents[name] for name in names}
        with writing(directory / file):
            _write(own, directory / file, lambda now, before=done: (written or _silent)(before + now, total))  # type: ignore[misc]
        done += sum(content.nbytes for content in own.values())
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _silent(done: int, total: int) -> None: ...


def _write(contents: Mapping[str, Content], path: Path, written: Callable[[int], object]) -> None:
    offset, header = 0, dict[str, object](_HEADER)
    for name, content in contents.items():
        place = {
            "dtype": _NAMES[content.dtype],
            "shape": content.shape,
            "data_offsets": (offset, offset + content.nbytes),
        }
        header[name], offset = place, offset + content.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with Stream(path) as stream:
        stream.write(memoryview(struct.pack("<Q", len(text)) + text))
        for name, content in contents.items():
            stream.write(_bytes(name, content))
            done += content.nbytes
            written(done)


def _bytes(name: str, content: Content) -> memoryview:
    value = content.make().detach().contiguous()
    assert (tuple(value.shape), value.dtype) == (content.shape, content.dtype), name
    if value.is_floating_point() and value.numel() and value.dtype.itemsize > 1:
        low, high = value.aminmax()  # both are NaN if a value is NaN
        if not bool(low.isfinite() & high.isfinite()):
            narrow = value.dtype.itemsize < torch.float32.itemsize
            other = "merge in fp32 (--dtype fp32)" if narrow else "at its file"
            hint = f"look at the training that made it, or {other}"
            raise PeftfxError("this tensor holds NaN or an infinity", name, hint)
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
