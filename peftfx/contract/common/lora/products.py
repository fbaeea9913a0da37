"""Products of matrices without gradients: by oneDNN's kernel where it takes less time than MKL's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

#: From this many numbers in the right matrix on, oneDNN takes less time for a few rows on the left, too.
_LARGE = 2**19
#: For fewer rows, and transposed weights, MKL has a faster kernel.
_FEW = 4
#: The fewest vectors of a piece, and the fewest pieces for which a product of pieces takes less time.
_PIECE, _PIECES = 256, 4
#: From this many multiplications on, oneDNN takes less time whatever the shapes.
_MANY = 2**26


def fast_product(x: Tensor, y: Tensor) -> Tensor:
    """Return `x @ y` of two matrices of one dtype, [n, k] and [k, m], outside of autograd.

    On x86, torch's `mm` of float32 is MKL's. Its linear layer by oneDNN, which its compiler calls, rounds the same way
    and sums in another order. On an AMD EPYC it takes 0.5 to 0.97 of the time: least with 1,024 columns and more. On an
    Intel Xeon it takes up to 1.05 of it, so there the product is `mm`. Under a dispatch mode, such as one that counts
    operations, it is `mm` too, which the mode knows.
    """
    rows, size = x.shape[0], y.numel()
    large = (rows >= _FEW and size >= _LARGE) or rows * size >= _MANY
    if not large or x.dtype != torch.float32 or not x.is_cpu or is_in_torch_dispatch_mode():
        return x @ y
    if _is_of_intel() or not _are_both_there():
        return x @ y
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, y.T, None, "none", [], "")
    return found


def chained_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return `(x @ y) @ z`, [r, k], [k, n] and [n, m] of one dtype, with a small `r`, outside of autograd.

    Of a large `n` it is the sum over pieces that fit into a CPU's cache. A thread multiplies its own pieces, which at
    1,024 columns takes 0.6 to 0.7 of the time of two products that the threads share.
    """
    count = _pieces(y.shape[1])
    if count < max(_PIECES, torch.get_num_threads()):
        return fast_product(fast_product(x, y), z)
    ys, zs = y.T.view(count, -1, y.shape[0]), z.view(count, -1, z.shape[1])
    xs = x.contiguous().expand(count, *x.shape)
    return torch.bmm(torch.bmm(xs, ys.transpose(1, 2)), zs).sum(0)


def _pieces(count: int) -> int:
    """Return into how many equal pieces of at least `_PIECE` vectors some vectors are divided: a power of two."""
    pieces = 1
    while count % (2 * pieces) == 0 and count >= 2 * pieces * _PIECE:
        pieces *= 2
    return pieces


def _are_both_there() -> bool:
    """Return whether torch has both libraries, and a user has not switched oneDNN off."""
    there = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return there and bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _is_of_intel() -> bool:
    """Return whether the CPU is Intel's, for which MKL has its fastest kernels."""
    return str(torch.cpu.get_capabilities().get("cpu_name")).startswith("Intel")
