"""Memory that is reused in ONNX Runtime for a growing key/value cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftfx.generation.step import GraphCache


class Buffers:
    """Two pieces of memory for each name: one call reads the first and writes the second, the next call vice versa."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[Tensor]] = {}

    def room(self, name: str, shape: tuple[int, ...], read: Tensor) -> Tensor:
        """Return memory of this shape, with the dtype of `read` but no memory of `read`. Its contents are arbitrary.

        The memory stays valid during the next call with this name. The call after that writes into it.
        """
        pair = self._pairs.setdefault(name, [read.new_empty(0), read.new_empty(0)])
        own = read.untyped_storage().data_ptr()
        index = next(i for i, piece in enumerate(pair) if piece.untyped_storage().data_ptr() != own or not own)
        size = math.prod(shape)
        if pair[index].numel() < size or pair[index].dtype != read.dtype:
            # Twice the size, because a cache grows by one token at a time.
            pair[index] = torch.empty(2 * size, dtype=read.dtype)
        return pair[index][:size].view(shape)


class BufferedCache(GraphCache):
    """A cache whose tensors are written into reused memory, step by step.

    As with transformers' caches, the contents before a step are invalid after the next step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers = Buffers()
