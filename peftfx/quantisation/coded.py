"""Coded: a parameter that is quantised in its file, and dequantised by each operator that reads it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peftfx.graph.lazy_weights import Stored
from peftfx.quantisation.codes import Codes

_View = Callable[[Tensor], Tensor]


class Coded(Stored):
    """A tensor that stands for the weight of some codes. Each operator that needs its values dequantises them.

    So a model with 4-bit files can run in float32 with only one dequantised weight in memory. The tensor is read-only.

    Attributes:
        codes: the stored codes.
        views: the views, applied in turn, that lead from the matrix [out, in] to this tensor.
        like: a tensor with this tensor's shape and strides, without values.
    """

    codes: Codes
    views: tuple[_View, ...]
    like: Tensor

    @staticmethod
    def __new__(
        cls,
        codes: Codes,
        dtype: torch.dtype = torch.float32,
        *,
        views: tuple[_View, ...] = (),
        device: torch.device | str = "cpu",
    ) -> Coded:
        like = torch.empty(codes.shape, device="meta")
        for view in views:
            like = view(like)
        made: Coded = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=dtype, device=torch.device(device)
        )
        made.codes, made.views, made.like = codes, views, like
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Coded({list(self.shape)}, {self.codes.format} as {self.dtype})"

    @property
    def source(self) -> Tensor:  # type: ignore[override]
        """The float32 values, computed at each access, or kept since the first: see `keeping`."""
        values = _values_of(self.codes).to(self.device)
        for view in self.views:
            values = view(values)
        return values

    def moved(self, view: _View) -> Coded:
        """Return a view of this tensor, without computing it."""
        return Coded(self.codes, self.dtype, views=(*self.views, view), device=self.device)

    @property
    def identity(self) -> object:
        """A value that is equal for two equal views of one weight."""
        return id(self.codes), self.like.shape, self.like.stride(), self.like.storage_offset(), self.dtype

    @property
    def transposed(self) -> bool | None:
        """Whether this tensor is the matrix [in, out]; None if it is neither that nor [out, in]."""
        rows, columns = self.codes.shape
        if self.like.storage_offset() or self.like.ndim != 2 or self.like.numel() != rows * columns:
            return None
        if self.like.shape == (rows, columns) and self.like.stride() == (columns, 1):
            return False
        return True if self.like.shape == (columns, rows) and self.like.stride() == (1, columns) else None


_MOST = 16 << 30  #: the most bytes that are kept; never more than half of the free space


@dataclass
class _Kept:
    folder: Path
    left: int
    found: dict[int, tuple[Codes, Tensor]] = field(default_factory=dict)

    def values(self, codes: Codes) -> Tensor:
        if id(codes) in self.found:
            return self.found[id(codes)][1]
        made = codes.dequantise()
        if made.nbytes > self.left or not made.numel():
            return made
        self.left -= made.nbytes
        kept = mapped_copy(made, self.folder)
        self.found[id(codes)] = codes, kept  # keep the codes too, so that no other object can get their id
        return kept


def mapped_copy(values: Tensor, beside: Path) -> Tensor:
    """Return a copy in a memory-mapped file without a name, on the disk of the directory `beside`."""
    if not values.numel():
        return values
    with tempfile.TemporaryDirectory(prefix="values-", dir=beside) as folder:
        file = str(Path(folder) / "0")
        mapped = torch.from_file(file, shared=True, size=values.numel(), dtype=values.dtype).view(values.shape)
        return mapped.copy_(values)  # the mapping stays valid after its file is deleted


_CURRENT: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def keeping(beside: Path) -> Iterator[None]:
    """Dequantise each weight only once inside the context, into memory-mapped files, while there is room.

    The kernel can drop mapped pages from memory at any time. The files have no names, so they vanish when the process
    ends.
    """
    with tempfile.TemporaryDirectory(prefix="values-", dir=beside) as folder:
        token = _CURRENT.set(_Kept(Path(folder), min(_MOST, shutil.disk_usage(folder).free // 2)))
        try:
            yield
        finally:
            _CURRENT.reset(token)


def _values_of(codes: Codes) -> Tensor:
    """Return the float32 weight [out, in] of codes. It may be shared, and must not be written."""
    kept = _CURRENT.get()
    return codes.dequantise() if kept is None else kept.values(codes)
