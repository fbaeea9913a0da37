"""Coded: a parameter of a model that is quantised in its file, and dequantised by whatever computes with it."""

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
    """Looks like the weight that codes stand for; each operator that needs its values dequantises them for itself.

    So a model of 4-bit files can be run in float32 with one weight of it in memory. It is read-only.

    Attributes:
        codes: what is stored.
        views: of the matrix [out, in], one after another: how this tensor sees it.
        like: of its shape and strides, without values.
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
        """The values, float32, computed now, or kept since they were: see `keeping`."""
        values = _values_of(self.codes).to(self.device)
        for view in self.views:
            values = view(values)
        return values

    def moved(self, view: _View) -> Coded:
        """A view of it: nothing is computed."""
        return Coded(self.codes, self.dtype, views=(*self.views, view), device=self.device)

    @property
    def identity(self) -> object:
        """Equal for two views of one weight that look the same."""
        return id(self.codes), self.like.shape, self.like.stride(), self.like.storage_offset(), self.dtype

    @property
    def transposed(self) -> bool | None:
        """Whether it is the matrix [in, out]; None where it is neither that nor [out, in]."""
        rows, columns = self.codes.shape
        if self.like.storage_offset() or self.like.ndim != 2 or self.like.numel() != rows * columns:
            return None
        if self.like.shape == (rows, columns) and self.like.stride() == (columns, 1):
            return False
        return True if self.like.shape == (columns, rows) and self.like.stride() == (1, columns) else None


_MOST = 16 << 30  #: bytes that are kept, and never more than half of what is free


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
        self.found[id(codes)] = codes, kept  # with the codes: no others can get their number meanwhile
        return kept


def mapped_copy(values: Tensor, beside: Path) -> Tensor:
    """A copy in a mapped file without a name, on the disk of this directory: in no memory but what can be dropped."""
    if not values.numel():
        return values
    with tempfile.TemporaryDirectory(prefix="values-", dir=beside) as folder:
        file = str(Path(folder) / "0")
        mapped = torch.from_file(file, shared=True, size=values.numel(), dtype=values.dtype).view(values.shape)
        return mapped.copy_(values)  # the mapping stays when its file is gone


_CURRENT: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def keeping(beside: Path) -> Iterator[None]:
    """Inside, a weight is dequantised once, into a mapped file on the disk of this directory, as long as there is room.

    Mapped files are in no memory but what the kernel can drop. They have no names: whatever ends the process ends them.
    """
    with tempfile.TemporaryDirectory(prefix="values-", dir=beside) as folder:
        token = _CURRENT.set(_Kept(Path(folder), min(_MOST, shutil.disk_usage(folder).free // 2)))
        try:
            yield
        finally:
            _CURRENT.reset(token)


def _values_of(codes: Codes) -> Tensor:
    """The float32 weight [out, in] of codes; it may be kept, and is not to be written."""
    kept = _CURRENT.get()
    return codes.dequantise() if kept is None else kept.values(codes)
