"""The orthonormal factor of a tall matrix, with LAPACK's reflections and signs, in operators that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(p: Tensor) -> Tensor:
    """Return Q of `p = Q R`, [rows, columns], as `torch.linalg.qr` gives it. There are no more columns than rows."""
    rows, columns = p.shape
    vectors: list[Tensor] = []
    for i in range(columns):
        below = p[i:, i]
        first, norm = below[:1], below.norm()
        v = torch.cat([first + torch.where(first < 0, -norm, norm), below[1:]])
        v = torch.cat([p.new_zeros(i), v / v.norm()])
        vectors.append(v)
        p = p - 2 * torch.outer(v, v @ p)
    q = torch.eye(rows, columns, dtype=p.dtype, device=p.device)
    for v in reversed(vectors):
        q = q - 2 * torch.outer(v, v @ q)
    return q
