"""`torch.nn.MultiheadAttention` as HF PEFT's LoRA treats it: one module, adapted at both of its projections.

The attention's own code reads the weights of both projections and calls no layer, so a graph has two sites,
`a.in_proj_weight` and `a.out_proj`. HF PEFT adapts the attention at `a`. In HF PEFT a LoRA on only the layer
`a.out_proj` changes nothing, because the attention never calls that layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.sites.site import Site

IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"


def is_read_by_attention(base: nn.Module, path: str) -> bool:
    """Return whether a path is the output layer of a torch attention, which reads its weight but never calls it."""
    owner, _, leaf = path.rpartition(".")
    return leaf == OUT_PROJ and isinstance(base.get_submodule(owner), nn.MultiheadAttention)


def wrapper_of(base: nn.Module, method: Method, path: str) -> str | None:
    """Return the path of the attention that HF PEFT adapts if the site at `path` is one of its projections, or None."""
    owner, _, leaf = path.rpartition(".")
    if not method.wraps_attention or leaf not in (IN_PROJ, OUT_PROJ):
        return None
    return owner if isinstance(base.get_submodule(owner), nn.MultiheadAttention) else None


def cut_attentions(base: nn.Module, sites: Iterable[Site]) -> set[str]:
    """Return the paths of torch attentions that run with a split input projection, which is then not a site."""
    paths = {site.path for site in sites}
    own = {path for path, m in own_modules(base) if isinstance(m, nn.MultiheadAttention)}
    return {path for path in own if f"{path}.{IN_PROJ}".removeprefix(".") not in paths}
