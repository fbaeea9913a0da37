"""Skew-symmetric matrices, of which rotations are made."""

from __future__ import annotations

import torch
from torch import Tensor


def skew_matrix(upper: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices [..., size, size] with these entries above the diagonal, row by row."""
    if size == 1:  # it has none, and ONNX has no list of no places
        return upper.sum(-1)[..., None, None]
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], size * size).index_copy(-1, rows * size + columns, upper)
    square = flat.unflatten(-1, (size, size))
    return square - square.mT


def cayley(skew: Tensor) -> Tensor:
    """Return Cayley's form `(I - Q) (I + Q)^-1` of these matrices `Q`: in float32, or in float64 if `Q` is.

    torch solves no equations in half precision.
    """
    wide = skew.to(torch.promote_types(skew.dtype, torch.float32))
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device).expand_as(wide)
    return torch.linalg.solve(eye + wide, eye - wide, left=False)
