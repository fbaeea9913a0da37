"""round_by_inputs: GPTQ. A weight is rounded column by column; what a column loses is made up for in those that follow.

Of a product `x @ W.T` with the inputs x of a text it is the outputs that count: rounded to Q, they are off by
`tr((W - Q) H (W - Q).T)`, `H = x.T @ x`. The column i is rounded to the grid of its block, and with the Cholesky factor
U of H's inverse, `U.T @ U = H^-1`, the columns after it take over `(w_i - q_i) / U_ii * U_i`.

https://arxiv.org/abs/2210.17323 (algorithm 1). Grids are those of the whole weight before anything was rounded, so that
columns can be rounded in the order of their inputs' sizes, the largest first, and stay in their places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.quantisation.rounding import Rounded

_DAMP = 0.01  #: of the mean of H's diagonal, added to it: an input that the text hardly has would count for nothing
_COLUMNS = 128  #: that are rounded before the others take over what they lost
_AT_ONCE = 1 << 23  #: numbers of a weight that are rounded at a time: its rows are independent


def factor_of(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """What rounding needs of `x.T @ x`: the order of columns, and the factor U in that order.

    Args:
        hessian: float32 or float64 [in, in].

    Returns:
        int64 [in], and float32 [in, in], upper triangular.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    inner = hessian[order][:, order]
    damp = _DAMP * float(diagonal.mean())
    for _ in range(8):  # a text of few tokens has directions without inputs
        inner.diagonal().add_(damp if damp > 0 else 1.0)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return order, upper.float()
        damp *= 10
    return order, torch.eye(len(order))  # nothing is made up for


def round_by_inputs(weight: Tensor, grid: Rounded, factor: tuple[Tensor, Tensor], bits: int) -> Rounded:
    """The integers of a weight on a grid, chosen for what its outputs are.

    Args:
        weight: float32 [out, in].
        grid: its blocks' scales and zeros; the scales as they are written.
        factor: of its inputs, see `factor_of`.
        bits: of an integer.
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
    left = weight.T[order].contiguous()  # [in, out]: a column is read and written whole
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
    """The norm of what the outputs of a rounded weight are off by, over the norm of the outputs."""
    off = weight - rounded
    lost, whole = ((part @ hessian * part).sum().clamp(min=0) for part in (off, weight))
    return float((lost / whole.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())
