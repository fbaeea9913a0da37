"""Buffers: memory that a growing key/value cache is written into again and again, in ONNX Runtime."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftfx.generation.step import GraphCache


class Buffers:
    """Two pieces of memory for each name: what is read this time was written last time, so the other is written now."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[Tensor]] = {}

    def room(self, name: str, shape: tuple[int, ...], read: Tensor) -> Tensor:
        """Memory of this shape, and of the dtype of `read`, which it shares nothing with. Its contents are left over.

        It lasts until the call after the next of this name.
        """
        pair = self._pairs.setdefault(name, [read.new_empty(0), read.new_empty(0)])
        own = read.untyped_storage().data_ptr()
        index = next(i for i, piece in enumerate(pair) if piece.untyped_storage().data_ptr() != own or not own)
        size = math.prod(shape)
        if pair[index].numel() < size or pair[index].dtype != read.dtype:
            pair[index] = torch.empty(2 * size, dtype=read.dtype)  # twice: a cache grows by one token at a time
        return pair[index][:size].view(shape)


class BufferedCache(GraphCache):
    """A cache whose tensors are written into memory of its own, step by step.

    As with transformers' caches, what it held before a step is gone after the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers = Buffers()
