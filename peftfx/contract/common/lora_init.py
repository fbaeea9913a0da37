"""What LoRA's factors are at the start: HF PEFT's initialisations, at random or from the weight itself."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

Start = bool | str
"""True (Kaiming A, zero B), False (both random), `gaussian`, `pissa`, `pissa_niter_[n]`, `olora`."""


def check_start(how: Start) -> None:
    """Refuse a start that HF PEFT has no name for."""
    known = how in (True, False, "gaussian", "pissa", "olora")
    if not known and not re.fullmatch(r"pissa_niter_\d+", str(how)):
        hint = "one of True, False, 'gaussian', 'pissa', 'pissa_niter_16', 'olora'"
        raise PeftfxError(f"unknown initialisation {how!r}", "init_lora_weights", hint)


def starts_from_weight(how: Start) -> bool:
    """Whether the factors at the start are some of the weight, which the update then is without."""
    return isinstance(how, str) and how != "gaussian"


def fill(how: Start, site: Site, a: Tensor, b: Tensor, rng: torch.Generator | None) -> None:
    """Random factors, in place of zeros; one of the two stays zero where the update is to start as nothing."""
    if site.kind == "embedding":
        b.normal_(generator=rng)
        if how is False:
            a.normal_(generator=rng)
    elif how == "gaussian":
        a.normal_(std=1 / a.shape[0], generator=rng)
    else:
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        if how is False:
            torch.nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=rng)


def factors_of(how: Start, site: Site, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with `s B A` (PiSSA) or `B A` (OLoRA) the best or the orthogonal low-rank part of `weight`."""
    if site.kind != "linear":
        hint = "leave convs and embeddings out of this rule"
        raise PeftfxError(f"{how} starts from a linear weight, not from a {site.kind}", site.path, hint)
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if how == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        niter = int(str(how).rpartition("_")[2])
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # the factors are computed again when the adapter is loaded: they must be the same
            u, s, v = torch.svd_lowrank(weight, r, niter=niter)
        vh = v.T
    root = torch.sqrt(s[:r] / scaling)
    return root[:, None] * vh[:r], u[:, :r] * root
