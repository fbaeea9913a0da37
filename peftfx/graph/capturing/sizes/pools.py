"""Pools over free axes during a capture, where torch's own fix the axis at the example's size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.graph.capturing.sizes.free_arguments import is_free


@contextmanager
def pools_of_lines() -> Iterator[None]:
    """Compute `torch.max_pool1d` over a free axis as a pool of a plane of one row: torch's own fixes the axis."""
    kept = {name: getattr(torch, name) for name in ("max_pool1d", "max_pool1d_with_indices")}

    def pool(name: str) -> Callable[..., Any]:
        plane = getattr(F, name.replace("1d", "2d"))

        @functools.wraps(kept[name])
        def pooled(
            input: Tensor,
            kernel_size: Any,
            stride: Any = None,
            padding: Any = 0,
            dilation: Any = 1,
            ceil_mode: bool = False,
        ) -> Any:
            if not is_free(input.shape[-1]):
                return kept[name](input, kernel_size, stride, padding, dilation, ceil_mode)
            sizes = (kernel_size, stride or kernel_size, padding, dilation)
            own = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
            rows = ((first, size) for first, size in zip((1, 1, 0, 1), own, strict=True))
            found = plane(input.unsqueeze(-2), *rows, ceil_mode)
            return tuple(t.squeeze(-2) for t in found) if isinstance(found, tuple) else found.squeeze(-2)

        return pooled

    for name in kept:
        setattr(torch, name, pool(name))
    try:
        yield
    finally:
        for name, own in kept.items():
            setattr(torch, name, own)
