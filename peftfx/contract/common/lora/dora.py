"""DoRA's magnitude: the norm of each output row of a weight, learned separately from the row's direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.contract.broadcast import along_channels, along_rows
from peftfx.contract.method import Base
from peftfx.sites.site import Site

MAGNITUDE = "lora_magnitude_vector"
#: How many values of a weight are updated at once. On a CPU they fit into its cache.
_PIECE = {"cpu": 2**18, "other": 2**24}


def row_norms(site: Site, weight: Tensor) -> Tensor:
    """Return the norm of each output row, in the shape in which HF PEFT stores the magnitude."""
    if site.kind == "embedding":
        return torch.linalg.vector_norm(weight, dim=0)
    if site.kind == "linear":
        return torch.linalg.vector_norm(weight, dim=1)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1).view(1, -1, *(1,) * (weight.ndim - 2))


def updated_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the norm of each row of `W + s B A`, for a linear site.

    A large weight is updated some rows at a time, in memory that is used again: the weight is read once, and no second
    tensor of its size is made. Compiled and traced calls compute one whole expression.
    """
    if fits_cache(weight) or isinstance(weight, FakeTensor) or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=scaling), dim=1)
    rows = max(1, _piece(weight) // weight.shape[1])
    pieces = zip(weight.split(rows), b.split(rows), strict=True)
    return torch.cat([torch.linalg.vector_norm(torch.addmm(w, part, a, alpha=scaling), dim=1) for w, part in pieces])


def fits_cache(weight: Tensor) -> bool:
    """Return whether the updated weight is computed at once for its norms, not some rows at a time."""
    return weight.numel() <= _piece(weight)


def _piece(weight: Tensor) -> int:
    return _PIECE["cpu" if weight.device.type == "cpu" else "other"]


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return the factor of each output row that gives the row its magnitude. The norm is a constant in the gradient."""
    return magnitude.flatten() / norms.detach().flatten()


def rescaled(site: Site, y: Tensor, bias: Tensor | None, gains: Tensor, delta: Tensor) -> Tensor:
    """Return `g (W x + delta) + b`, where `y = W x + b`."""
    rescaled_sum = along_channels(gains, site) * (unbiased(site, y, bias) + delta)
    return rescaled_sum if bias is None else rescaled_sum + along_channels(bias, site)


def unbiased(site: Site, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return `W x`, where `y = W x + b`."""
    return y if bias is None else y - along_channels(bias, site)


def rescaled_apart(site: Site, y: Tensor, bare: Tensor, gains: Tensor, delta: Tensor, scaling: float) -> Tensor:
    """Return `y + (g - 1) W x' + g s delta`, summed in HF PEFT's order.

    Args:
        bare: `W x'`: of the input after dropout, if there is any, while `y` is of the whole input, as in HF PEFT.
    """
    gains = along_channels(gains, site)
    return y + ((gains - 1) * bare + gains * delta * scaling)


def folded(site: Site, base: Base, under: Base, weight: Tensor, gains: Tensor) -> Base:
    """Return the updated weight with rescaled rows, and the bias of `under`.

    As in HF PEFT, the norm is that of the base with only this DoRA's update, but the updates of all adapters are
    rescaled; in the bias, what other adapters added.

    Args:
        under: the weight and bias after earlier adapters.
        weight: the weight of `under` plus this DoRA's update.
    """
    bias = under.bias
    if bias is not None and bias is not base.bias:
        bias = bias + (gains - 1) * (bias if base.bias is None else bias - base.bias)
    return Base(weight * (gains if site.kind == "embedding" else along_rows(gains, weight)), bias)
