"""`torch.nn.MultiheadAttention` as HF PEFT's LoRA knows it: one module, adapted at both of its projections.

Its own code reads their weights and calls no layer, so in a graph they are two sites, `a.in_proj_weight` and
`a.out_proj`. HF PEFT knows the attention at `a`; a LoRA on the layer `a.out_proj` alone changes nothing there.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.sites.site import Site

IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"


def is_read_by_attention(base: nn.Module, path: str) -> bool:
    """Whether this is the output layer of an attention of torch's, which reads its weight and never calls it."""
    owner, _, leaf = path.rpartition(".")
    return leaf == OUT_PROJ and isinstance(base.get_submodule(owner), nn.MultiheadAttention)


def wrapper_of(base: nn.Module, method: Method, path: str) -> str | None:
    """The attention that HF PEFT adapts by this method where the site at `path` is one of its projections."""
    owner, _, leaf = path.rpartition(".")
    if not method.wraps_attention or leaf not in (IN_PROJ, OUT_PROJ):
        return None
    return owner if isinstance(base.get_submodule(owner), nn.MultiheadAttention) else None


def cut_attentions(base: nn.Module, sites: Iterable[Site]) -> set[str]:
    """The attentions of torch's that run with their input projection cut into several, which is no site then."""
    paths = {site.path for site in sites}
    own = {path for path, m in own_modules(base) if isinstance(m, nn.MultiheadAttention)}
    return {path for path in own if f"{path}.{IN_PROJ}".removeprefix(".") not in paths}
