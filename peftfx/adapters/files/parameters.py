"""HF PEFT's file format for parameters that are adapted without a layer (`target_parameters`).

PEFT wraps the module that holds such a parameter, and wraps the wrapper again for each further parameter. So the
factors of the module's last parameter are under the module's path, those of the parameter before it under
`base_layer`, and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftfx.contract.method import Method
from peftfx.contract.placed import Placed
from peftfx.contract.placement import Placement, owner_of
from peftfx.errors import PeftfxError
from peftfx.graph.places import has_module
from peftfx.rules.parameters import TARGET_PARAMETERS, picks
from peftfx.sites.site import EXPERTS, Site


def parameter_path(base: nn.Module, method: Method, path: str) -> str:
    """Return the path under which a file has the factors of a parameter; a module's path stays the same."""
    if has_module(base, path) or not picks(method, path):
        return path
    owner, leaf = owner_of(base, path)
    names = [name for name, _ in owner.named_parameters(recurse=False)]
    holder = path.removesuffix(leaf).removesuffix(".")
    inside = [name for name in names if picks(method, f"{holder}.{name}")]
    return holder + ".base_layer" * (len(inside) - 1 - inside.index(leaf))


def as_parameters(base: nn.Module, rule: Placed) -> dict[str, str]:
    """Return the names of the parameters that HF PEFT adapts without a layer, by the paths of their sites."""
    if TARGET_PARAMETERS not in rule.method.options():
        return {}
    sites = {p.site.path: p.site for p in rule.placements}
    return {path: site.parameter for path, site in sites.items() if is_bare(base, rule.method, site)}


def naming_parameters(method: Method, names: Mapping[str, str]) -> Method:
    """Return a rule whose `target_parameters` are these names, or the rule itself if it names them already."""
    if not names or (method.target is None and method.target_parameters):
        return method
    return dataclasses.replace(method, **{TARGET_PARAMETERS: tuple(sorted(names.values()))})  # type: ignore[arg-type]


def refuse_turned(base: nn.Module, placements: Iterable[Placement]) -> None:
    """Refuse parameters whose storage order (in, out) HF PEFT would read the other way round.

    For experts, HF PEFT reads the storage order from the module's `is_transposed`. A single weight is always taken for
    [out, in].

    Raises:
        PeftfxError: HF PEFT would read the other order, so that its A would be our B.
    """
    for placement in placements:
        site = placement.site
        stored = "[in, out]" if site.transposed else "[out, in]"
        if site.kind == EXPERTS:
            owner, _ = owner_of(base, site.path)
            if bool(getattr(owner, "is_transposed", False)) != site.transposed:
                what = (
                    f"the weight of each expert is stored as {stored}, and HF PEFT reads it the other way "
                    "round because of its module's class"
                )
                raise PeftfxError(what, site.path, f"set is_transposed = {site.transposed} on the module's class")
        elif site.transposed and picks(placement.method, site.parameter):
            what = f"it is stored {stored}, and HF PEFT takes what target_parameters name for [out, in]"
            raise PeftfxError(what, site.parameter, "name the module in target_modules, if it is a layer")


def without_place(base: nn.Module, method: Method, site: Site) -> bool:
    """Return whether HF PEFT can adapt neither a layer nor a parameter at a site."""
    alone = site.path == site.parameter and not _of_torch_attention(base, site)
    return alone and not (TARGET_PARAMETERS in method.options() and is_bare(base, method, site))


def _of_torch_attention(base: nn.Module, site: Site) -> bool:
    return isinstance(owner_of(base, site.path)[0], nn.MultiheadAttention)


def is_bare(base: nn.Module, method: Method, site: Site) -> bool:
    """Return whether HF PEFT has no layer for a site: experts, and layers of the model's own classes, as routers."""
    if site.kind == EXPERTS or picks(method, site.parameter):
        return True
    if site.kind != "linear" or site.transposed:
        return False
    if not has_module(base, site.path):
        return "." in site.path and not _of_torch_attention(base, site) and not method.at_layers_alone
    module = base.get_submodule(site.path)
    known = isinstance(module, nn.Linear | Conv1D | nn.MultiheadAttention)
    return not known and isinstance(module._parameters.get("weight"), nn.Parameter)
