"""Round a weight by GPTQ: column by column, while the following columns compensate the error of each column.

GPTQ makes the error of the outputs `x @ W.T` small, where x are the inputs on a text. If W is rounded to Q, the squared
error is `tr((W - Q) H (W - Q).T)` with `H = x.T @ x`. Column i is rounded to the grid of its block. With the Cholesky
factor U of H's inverse, `U.T @ U = H^-1`, the later columns are reduced by `(w_i - q_i) / U_ii * U_i`.

https://arxiv.org/abs/2210.17323 (algorithm 1). The grids are computed from the whole weight before any column is
rounded. Columns can therefore be rounded in the order of their inputs' magnitudes, the largest first, without being
moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.quantisation.rounding import Rounded

_DAMP = 0.01  #: share of the mean of H's diagonal that is added to it, so that inputs rare in the text count, too
_COLUMNS = 128  #: how many columns are rounded before all later columns are updated
_AT_ONCE = 1 << 23  #: how many numbers of a weight are rounded at a time (rows are independent)


def factor_of(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return what GPTQ needs of `x.T @ x`: the order of columns, and the factor U in that order.

    Args:
        hessian: the matrix `x.T @ x`, float32 or float64 [in, in].

    Returns:
        The order, int64 [in], and U, float32 [in, in], upper triangular.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    inner = hessian[order][:, order]
    damp = _DAMP * float(diagonal.mean())
    for _ in range(8):  # a short text gives a singular matrix
        inner.diagonal().add_(damp if damp > 0 else 1.0)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return order, upper.float()
        damp *= 10
    return order, torch.eye(len(order))  # without compensation


def round_by_inputs(weight: Tensor, grid: Rounded, factor: tuple[Tensor, Tensor], bits: int) -> Rounded:
    """Choose the integers of a weight on a grid so that the error of its outputs is small.

    Args:
        weight: the weight, float32 [out, in].
        grid: the scales and zeros of its blocks. The scales have the values that are written.
        factor: the factor of its inputs, see `factor_of`.
        bits: the number of bits of an integer.
    """
    rows = max(1, _AT_ONCE // weight.shape[1])
    integers = grid.integers.clone().flatten(1)
    for start in range(0, len(weight), rows):
        at = slice(start, start + rows)
        zeros = None if grid.zeros is None else grid.zeros[at].float()
        block = grid.integers.shape[-1]
        integers[at, : weight.shape[1]] = _rows(weight[at], grid.scales[at].float(), zeros, block, factor, bits)
    return Rounded(integers.view_as(grid.integers), grid.scales, grid.zeros)


def _rows(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, block: int, factor: tuple[Tensor, Tensor], bits: int
) -> Tensor:
    order, upper = factor
    left = weight.T[order].contiguous()  # [in, out], so that a column is contiguous
    blocks, top = order // block, float((1 << bits) - 1)
    steps = scales.T[blocks]
    inverse = torch.where(steps != 0, 1 / steps, 0.0)
    middles = torch.full((1, 1), float(1 << bits - 1)).expand(len(order), 1) if zeros is None else zeros.T[blocks]
    found = torch.empty(weight.shape[1], len(weight), dtype=torch.uint8)
    for start in range(0, len(order), _COLUMNS):
        end = min(start + _COLUMNS, len(order))
        lost = torch.empty(end - start, len(weight))
        for i in range(start, end):
            integer = (left[i] * inverse[i]).round_().add_(middles[i]).clamp_(0, top)
            found[order[i]] = integer.to(torch.uint8)
            off = (left[i] - (integer - middles[i]) * steps[i]).div_(upper[i, i])
            lost[i - start] = off
            if i + 1 < end:
                left[i + 1 : end].addr_(upper[i, i + 1 : end], off, alpha=-1)
        if end < len(order):
            left[end:].addmm_(upper[start:end, end:].T, lost, alpha=-1)
    return found.T


def outputs_off(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the norm of the error of a rounded weight's outputs, relative to the norm of the outputs."""
    off = weight - rounded
    lost, whole = ((part @ hessian * part).sum().clamp(min=0) for part in (off, weight))
    return float((lost / whole.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())
