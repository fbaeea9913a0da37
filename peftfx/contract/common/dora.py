"""DoRA's magnitude: the norm of each output row of a weight, learned apart from the row's direction."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.sites.site import Site


def row_norms(site: Site, weight: Tensor) -> Tensor:
    """The norm of each output row, in the shape in which HF PEFT stores the magnitude."""
    if site.kind == "embedding":
        return torch.linalg.vector_norm(weight, dim=0)
    if site.kind == "linear":
        return torch.linalg.vector_norm(weight, dim=1)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1).view(1, -1, *(1,) * (weight.ndim - 2))


def gain(site: Site, magnitude: Tensor, weight: Tensor) -> Tensor:
    """The factor of each output row of `weight` that gives it its magnitude; the norm is a constant in the gradient."""
    return magnitude.flatten() / row_norms(site, weight).detach().flatten()
