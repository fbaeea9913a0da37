"""LoRA on a stack of experts' weights, as in HF PEFT's `target_parameters`: its factors and their start.

The update of expert e is `s B_e A_e`. The factors of all experts are stored as in HF PEFT. In A, [experts * r, in], the
rows of one expert are adjacent. In B, [out, r * experts], the columns of one expert are `experts` columns apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftfx.contract.broadcast import row_index
from peftfx.sites.blocks import Rows


def of_experts(count: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Split joint factors into those of each of `count` experts, [experts, r, in] and [experts, out, r]."""
    return a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)


def joint(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Join the factors of each expert, [experts, r, in] and [experts, out, r], as they are stored."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def transposed_factors(count: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the joint factors of `count` experts whose updates are the transposes of these factors' updates."""
    down, up = of_experts(count, a, b)
    return joint(up.mT, down.mT)


def of_parts(count: int, rows: int, parts: Sequence[tuple[Rows, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the factors of parts into factors of whole weights of `rows` rows: A stacked, B block-structured."""
    each = [(index, *of_experts(count, a, b)) for index, a, b in parts]
    down = torch.cat([a for _, a, _ in each], 1)
    up = down.new_zeros(count, rows, down.shape[1])
    at = 0
    for index, a, b in each:
        up[:, row_index(index), at : at + a.shape[1]] = b
        at += a.shape[1]
    return joint(down, up)


def fill_experts(how: bool | str, r: int, a: Tensor, b: Tensor, rng: torch.Generator | None) -> None:
    """Fill the zero factors of all experts with random numbers, as HF PEFT draws them."""
    if how == "gaussian":
        a.normal_(std=1 / r, generator=rng)
        return
    for factor in (a, b) if how is False else (a,):
        torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=rng)
