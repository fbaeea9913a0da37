"""Memory that starts on a page, in large pages if the system has them: the first touch of a large block costs less."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 4096  #: bytes of a page: files are mapped in pages, and direct writes are whole pages


def page_memory(size: int) -> mmap.mmap:
    """Return anonymous memory that starts on a page, in large pages if the system has them."""
    size = max(size, PAGE)
    private = getattr(mmap, "MAP_PRIVATE", None)  # not on Windows; shared memory has no large pages
    memory = mmap.mmap(-1, size) if private is None else mmap.mmap(-1, size, flags=private | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a hint, which not every system knows
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def page_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros in such memory, which is freed with the tensor."""
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(page_memory(count * dtype.itemsize), dtype=dtype, count=count).view(shape)
