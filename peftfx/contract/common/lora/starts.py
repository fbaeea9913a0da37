"""How LoRA's factors start: HF PEFT's initialisations, at random or from the weight itself."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from peftfx.contract.common.experts import fill_experts
from peftfx.contract.common.lora.factors import A0, B0
from peftfx.contract.common.low_rank import A, B
from peftfx.errors import PeftfxError
from peftfx.sites.site import EXPERTS, Site

Start = bool | str
"""True (Kaiming A, zero B), False (both random), `gaussian`, `orthogonal`, `pissa`, `pissa_niter_[n]`, `olora`, `mica`;
in files also `eva` and `lora_ga`, which need data to start."""

_NAMED = ("gaussian", "orthogonal", "pissa", "olora", "mica")
_NEEDS_DATA = {"eva": "activations", "lora_ga": "gradients"}
_MOVES_BASE = {"corda": "covariances", "loftq": "a quantisation of the base"}


def known_start(how: Start) -> Start:
    """Return a start as a bool, or as a known name in lower case.

    Raises:
        PeftfxError: HF PEFT has no such start, or files of adapters with this start lack what was changed in the base.
    """
    if isinstance(how, bool):
        return how
    name = str(how).lower()
    if name in _MOVES_BASE:
        what = f"{name} moves the base's weights by {_MOVES_BASE[name]}, which no file of the adapter holds"
        hint = "convert it with peft: save_pretrained(path_initial_model_for_weight_conversion=...), or merge it there"
        raise PeftfxError(what, "init_lora_weights", hint)
    if name not in (*_NAMED, *_NEEDS_DATA) and not re.fullmatch(r"pissa_niter_\d+", name):
        hint = f"one of True, False, {', '.join(map(repr, _NAMED))}, 'pissa_niter_16'"
        raise PeftfxError(f"unknown initialisation {how!r}", "init_lora_weights", hint)
    return name


def obstacle_of(how: Start, ranks: Iterable[int]) -> PeftfxError | None:
    """Return an error that says why no new adapter can have this start here, or None."""
    if how in _NEEDS_DATA:
        what = f"{how} starts from {_NEEDS_DATA[str(how)]} on data, which peftfx does not gather"
        hint = "start it with peft, and give transform its model (docs/coming-from-peft.md); or start by 'pissa'"
        return PeftfxError(what, "init_lora_weights", hint)
    if how == "orthogonal" and any(r % 2 for r in ranks):
        return PeftfxError("an orthogonal start needs an even rank", "r", "LoRA(r=8, init_lora_weights='orthogonal')")
    return None


def doubt_of(how: Start) -> str:
    """Return why a file with this start may not give what was trained. Empty if the file gives it."""
    if how == "lora_ga":
        return "lora_ga moves the base's weights in training, and not on loading, where HF PEFT leaves them too"
    if is_random(how):
        return f"{how} starts from a random approximation that the file lacks; the one made again differs from it"
    return ""


def is_random(how: Start) -> bool:
    """Return whether the start is a random approximation of the weight, which differs each time."""
    return isinstance(how, str) and how.startswith("pissa_niter_")


def starts_from_weight(how: Start) -> bool:
    """Return whether the factors start as a part of the weight. The update then subtracts that part."""
    return isinstance(how, str) and how.startswith(("pissa", "olora"))


def begin(
    how: Start,
    site: Site,
    weight: Tensor,
    p: dict[str, Tensor],
    scaling: float,
    rng: torch.Generator | None,
    *,
    bare: bool = False,
) -> None:
    """Fill zero factors with the start. If it comes from the weight, add copies of the factors, `A0` and `B0`.

    Args:
        weight: the site's weight, [out, in, *kernel].
        p: the factors `A` and `B`.
        scaling: the factor of their product.
        bare: whether the rule names the parameter. HF PEFT then starts a weight of any layer as a linear one.
    """
    if site.kind == EXPERTS:
        fill_experts(how, len(p[A]) // len(weight), p[A], p[B], rng)
    elif site.kind == "embedding" and bare:  # an embedding stores [in, out], so HF PEFT's A is this B
        fill_factors(how, dataclasses.replace(site, kind="linear"), p[B].mT, p[A].mT, rng)
    elif starts_from_weight(how) and (site.kind != "embedding" or is_random(how)):  # there HF PEFT starts as by True
        a, b = factors_of(how, site, weight.float(), len(p[A]), scaling)
        p[A], p[B] = a.to(p[A].dtype), b.to(p[B].dtype)
        p[A0], p[B0] = p[A].clone(), p[B].clone()
    elif how == "mica" and site.kind == "linear":
        p[B] = minor_of(site, weight.float(), len(p[A])).to(p[B].dtype)
    else:
        fill_factors(how, site, p[A], p[B], rng)


def fill_factors(how: Start, site: Site, a: Tensor, b: Tensor, rng: torch.Generator | None) -> None:
    """Fill zero factors with random numbers. One factor stays zero where the update is to start as zero."""
    if site.kind == "embedding":
        b.normal_(generator=rng)
        if how is False:
            a.normal_(generator=rng)
    elif how == "orthogonal":
        _orthogonal(site, a, b, rng)
    elif how == "gaussian":
        a.normal_(std=1 / a.shape[0], generator=rng)
    else:
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        if how is False:
            torch.nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=rng)


def _orthogonal(site: Site, a: Tensor, b: Tensor, rng: torch.Generator | None) -> None:
    """Fill factors whose product is zero: A and B use different rows of one rotation, which are orthogonal."""
    if site.kind != "linear":
        hint = "leave convs and embeddings out of this rule"
        raise PeftfxError(f"an orthogonal start is for linear weights, not for a {site.kind}", site.path, hint)
    r = a.shape[0]
    if error := obstacle_of("orthogonal", (r,)):
        raise error
    rotation = torch.linalg.qr(torch.empty(r, r, device=a.device).normal_(generator=rng))[0]
    down, up = (torch.empty(n, r // 2, device=a.device).normal_(generator=rng) for n in (a.shape[1], b.shape[0]))
    a.copy_((down @ rotation[0::2]).T / 10)
    b.copy_(up @ rotation[1::2] / 10)


def minor_of(site: Site, weight: Tensor, r: int) -> Tensor:
    """Return MiCA's B: the left singular vectors of the `r` smallest singular values."""
    if site.kind != "linear" or r > min(weight.shape):
        what = f"mica needs a linear weight of rank {r} or more, not a {site.kind} of {list(weight.shape)}"
        raise PeftfxError(what, site.path, "leave it out of this rule, or lower the rank")
    return torch.linalg.svd(weight, full_matrices=False)[0][:, -r:].contiguous()


def factors_of(how: Start, site: Site, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B: `s B A` (PiSSA) is the best, `B A` (OLoRA) the orthogonal low-rank part of `weight`."""
    if site.kind != "linear":
        hint = "leave convs and embeddings out of this rule"
        raise PeftfxError(f"{how} starts from a linear weight, not from one of kind {site.kind}", site.path, hint)
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if how == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        niter = int(str(how).rpartition("_")[2])
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # the same start must give the same adapter each time, also for a file that is read
            u, s, v = torch.svd_lowrank(weight, r, niter=niter)
        vh = v.T
    root = torch.sqrt(s[:r] / scaling)
    return root[:, None] * vh[:r], u[:, :r] * root
