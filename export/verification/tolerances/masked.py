"""Numbers that stand for none, such as scores of -10000 or of float32's least number for what is masked.

A tolerance is relative to the largest magnitude of an output. Beside such a number all others would pass. So what is
below a wide gap in the magnitudes is compared apart, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST = 10  #: masks are of 2 to this power, or more
_GAP = 7  #: and larger than all other numbers by 2 to this power, or more


def magnitude_of_masks(values: Tensor) -> float:
    """Return a magnitude that all usual numbers are below, and all masks are not; infinite if there are no masks.

    Masks are large, and near to each other: one number, to which a score may have been added.
    """
    sizes = values[values.isfinite() & (values != 0)].abs()
    if not sizes.numel() or float(sizes.max()) < 2.0**_LEAST:
        return math.inf
    exponents: list[int] = torch.frexp(sizes).exponent.unique().tolist()  # in order; x < 2 ** exponent
    largest = exponents[-1]
    usual = [exponent for exponent in exponents if exponent < largest - 1]
    if not usual or largest - 1 - usual[-1] <= _GAP:
        return math.inf
    return math.ldexp(1.0, largest - 2)


def relative_difference(want: Tensor, got: Tensor) -> float:
    """Return the largest difference of finite numbers, relative to the largest magnitude; 0 if there are no numbers.

    Where some numbers are masks, it is the larger one of that of all numbers and that of the others.
    """
    masks = magnitude_of_masks(want)
    usual = want.abs() < masks
    compared = ((want, got), (want[usual], got[usual])) if masks < math.inf else ((want, got),)
    return max(_relative(*both) for both in compared)


def _relative(want: Tensor, got: Tensor) -> float:
    if not want.numel():
        return 0.0
    largest = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((want - got).abs().max() / largest)
