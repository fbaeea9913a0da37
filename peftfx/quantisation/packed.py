"""Packed: the tensors of one quantised layer in a file, by their names in the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftfx.errors import PeftfxError


@dataclass(frozen=True)
class Packed:
    """A quantised layer of a checkpoint.

    Attributes:
        path: the path of the layer's module.
        tensors: the layer's tensors, by the part of their names after the path.
        config: the base's `quantization_config`.
        where: the base's directory, or the layer's class in memory.
        hint: what to do about a layer that cannot be read.
    """

    path: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    config: Mapping[str, object]
    where: str
    hint: str = "download the base again, or export from its unquantised original"

    def get(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """Return the layer's tensor `name`.

        Raises:
            PeftfxError: there is no such tensor, or its dtype is not one of the given `dtypes`.
        """
        if name not in self.tensors:
            raise self.wrong(f"there is no {name}")
        found = self.tensors[name]
        if dtypes and found.dtype not in dtypes:
            raise self.wrong(f"{name} has the dtype {str(found.dtype).removeprefix('torch.')}")
        return found

    def integer(self, name: str, *known: int) -> int:
        """Return the config's number `name`, which must be one of `known`, if any are given.

        Raises:
            PeftfxError: the number is missing or unknown.
        """
        value = self.config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or (known and value not in known):
            told = f" (peftfx reads {', '.join(map(str, known))})" if known else ""
            raise self.wrong(f"{name} is {value!r}{told}")
        return value

    def words_and_scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `qweight`, `qzeros` and `scales`, in which AutoGPTQ and AutoAWQ keep a layer.

        Raises:
            PeftfxError: one is missing or of another dtype, or the weight or its scales are no matrix.
        """
        weight, zeros = self.get("qweight", torch.int32), self.get("qzeros", torch.int32)
        scales = self.get("scales", torch.float16, torch.bfloat16, torch.float32)
        if weight.ndim != 2 or scales.ndim != 2:
            raise self.wrong(f"the shapes do not fit: qweight {list(weight.shape)}, scales {list(scales.shape)}")
        return weight, zeros, scales

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse the tensor `name` if it has another shape.

        Raises:
            PeftfxError: the shape is not `shape`.
        """
        have = tuple(self.get(name).shape)
        if have != shape:
            raise self.wrong(f"{name} is {list(have)}, but the layer's other tensors need {list(shape)}")

    def wrong(self, what: str) -> PeftfxError:
        """Return an error about this layer."""
        return PeftfxError(f"a quantised layer cannot be read: {what}", f"{self.where}: {self.path}", self.hint)


def nibbles(words: Tensor, bits: int) -> Tensor:
    """Return uint8 [..., n * 32 / bits]: the codes in int32 words, or in bytes, the lowest first.

    Codes are adjacent even if their bits do not divide 8: some codes start in one word and end in the next.
    """
    values = words.contiguous().view(torch.uint8)  # little-endian: the bytes are in order
    if bits == 8:
        return values
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (values.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)
    whole = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, -words.shape[-1] % bits))
    group = torch.nn.functional.pad(whole.unflatten(-1, (-1, bits)), (0, 1))  # 32 codes, and an empty word after them
    places = [divmod(number * bits, 32) for number in range(32)]
    codes = [(group[..., at] >> by | group[..., at + 1] << 32 - by) & (1 << bits) - 1 for at, by in places]
    return torch.stack([code.to(torch.uint8) for code in codes], -1).flatten(-2)
