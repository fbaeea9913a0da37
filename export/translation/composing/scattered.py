"""Values that are brought to the places that an index names, and reduced there, in operators that ONNX has.

ONNX's `ScatterElements` has no mean: torch's exporter writes the last value of each place in its stead. For
`index_reduce` it has no translation.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = "mean"
_SUM, _MEAN, _MAX = range(3)  #: the modes of `embedding_bag`


def scatter_mean(x: Tensor, dim: int, index: Tensor, values: Tensor, reduce: str, include_self: bool) -> Tensor:
    """Return `scatter_reduce` with a mean; places that the index does not name keep what they have."""
    counts = torch.full_like(x, int(include_self)).scatter_add(dim, index, torch.ones_like(values))
    kept = x if include_self else torch.where(counts > 0, 0, x)
    total, counts = kept.scatter_add(dim, index, values), counts.clamp(min=1)
    return total / counts if x.is_floating_point() else torch.div(total, counts, rounding_mode="floor")


def scatter_by(x: Tensor, dim: int, index: Tensor, values: Tensor | float, reduce: str) -> Tensor:
    """Return `scatter` with a reduction: values are added to others at their places, or multiply them."""
    given = values if isinstance(values, Tensor) else torch.full_like(index, values, dtype=x.dtype)
    return x.scatter_reduce(dim, index, given, {"add": "sum", "multiply": "prod"}[reduce], include_self=True)


def index_reduce(x: Tensor, dim: int, index: Tensor, values: Tensor, reduce: str, include_self: bool) -> Tensor:
    """Reduce whole rows; the index names a place for each."""
    shape = [1] * x.ndim
    shape[dim] = -1
    places = index.long().view(shape).expand_as(values)
    if reduce == MEAN:
        return scatter_mean(x, dim, places, values, reduce, include_self)
    return x.scatter_reduce(dim, places, values, reduce, include_self=include_self)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor]:
    """Return the sum, mean or maximum of the rows of each bag; a bag begins at its offset, and may be empty."""
    offsets = offsets[:-1] if include_last_offset else offsets
    # One place more than there are indices: an empty last bag begins there.
    starts = torch.zeros(indices.shape[0] + 1, dtype=torch.int64, device=weight.device)
    starts = starts.index_add(0, offsets.long(), torch.ones_like(offsets, dtype=torch.int64))
    bag = starts.cumsum(0)[:-1] - 1
    rows, counted = weight[indices], torch.ones_like(indices, dtype=weight.dtype)
    if padding_idx is not None:
        counted = (indices != padding_idx % weight.shape[0]).to(weight.dtype)
    counts = weight.new_zeros(offsets.shape[0]).index_add(0, bag, counted).unsqueeze(-1)
    shape = (offsets.shape[0], weight.shape[1])
    if mode == _MAX:
        rows = rows.masked_fill((counted == 0).unsqueeze(-1), -torch.inf)
        lowest = weight.new_full(shape, -torch.inf)
        most = lowest.scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), rows, "amax", include_self=True)
        return (torch.where(counts > 0, most, torch.zeros_like(most)),)
    counted = counted if per_sample_weights is None else counted * per_sample_weights
    total = weight.new_zeros(shape).index_add(0, bag, rows * counted.unsqueeze(-1))
    return (total / counts.clamp(min=1) if mode == _MEAN else total,)
