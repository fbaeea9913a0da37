"""Coded: a parameter of a model that is quantised in its file, and dequantised by whatever computes with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftfx.graph.lazy_weights import Stored
from peftfx.quantisation.codes import Codes
from peftfx.quantisation.kept import values_of

View = Callable[[Tensor], Tensor]


class Coded(Stored):
    """Looks like the weight that codes stand for; each operator that needs its values dequantises them for itself.

    So a model of 4-bit files can be run in float32 with one weight of it in memory. It is read-only.

    Attributes:
        codes: what is stored.
        views: of the matrix [out, in], one after another: how this tensor sees it.
        like: of its shape and strides, without values.
    """

    codes: Codes
    views: tuple[View, ...]
    like: Tensor

    @staticmethod
    def __new__(
        cls,
        codes: Codes,
        dtype: torch.dtype = torch.float32,
        *,
        views: tuple[View, ...] = (),
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
        """The values, float32, computed now, or kept since they were: see `peftfx.quantisation.kept`."""
        values = values_of(self.codes).to(self.device)
        for view in self.views:
            values = view(values)
        return values

    def moved(self, view: View) -> Coded:
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
