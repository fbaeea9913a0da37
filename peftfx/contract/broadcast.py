"""Functions that shape vectors of a site's inputs or outputs to broadcast against activations and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.sites.blocks import Rows
from peftfx.sites.site import Site


def along_channels(vector: Tensor, site: Site) -> Tensor:
    """Shape a vector of a site's inputs (or outputs) to multiply its input (or output) activations."""
    return vector.view(-1, *(1,) * (len(site.shape) - 2)) if site.kind == "conv" else vector


def along_rows(vector: Tensor, weight: Tensor) -> Tensor:
    """Shape a vector of outputs to multiply a weight [out, in, ...]."""
    return vector.view(-1, *(1,) * (weight.ndim - 1))


def along_columns(vector: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Shape a vector of inputs to multiply a weight [out, in / groups, ...]: each group reads its own inputs."""
    ones = (1,) * (weight.ndim - 2)
    if groups == 1:
        return vector.view(1, -1, *ones)
    return vector.view(groups, -1, *ones).repeat_interleave(weight.shape[0] // groups, 0)


def row_index(rows: Rows) -> Tensor:
    """Return the numbers of the rows of a part."""
    return torch.cat([torch.arange(start, end) for start, end in rows])


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of adapters for a base of `dtype`: fp32 for half precision, as in HF PEFT."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
