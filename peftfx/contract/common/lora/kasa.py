"""KaSA: LoRA with a trained diagonal between its factors (arXiv:2412.06071).

The weight's smallest singular values are removed by the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.contract.common.lora.factors import A0, B0
from peftfx.contract.common.low_rank import A
from peftfx.contract.method import Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

DIAG = "lora_diag"  #: the diagonal


def with_diagonal(
    site: Site, weight: Tensor, p: Params, scaling: float, rng: torch.Generator | None
) -> dict[str, Tensor]:
    """Add KaSA's diagonal, and factors of the part of the weight with the `r` smallest singular values.

    Raises:
        PeftfxError: the weight has no further singular values.
    """
    r = len(p[A])
    if r >= min(weight.shape):
        what = f"KaSA leaves out {r} singular values, and a weight of {list(weight.shape)} has {min(weight.shape)}"
        raise PeftfxError(what, site.path, f"r={min(weight.shape) - 1} or less")
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    a0, b0 = vh[-r:].contiguous(), u[:, -r:] * s[-r:] / scaling
    return {**p, A0: a0.to(p[A].dtype), B0: b0.to(p[A].dtype), DIAG: p[A].new_empty(r).normal_(generator=rng)}


def with_diagonal_in(p: Params) -> Params:
    """Return the parameters with the diagonal, if any, multiplied into A."""
    if DIAG not in p:
        return p
    return {name: t * p[DIAG][:, None] if name == A else t for name, t in p.items() if name != DIAG}
