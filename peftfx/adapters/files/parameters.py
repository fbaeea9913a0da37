"""HF PEFT's file format for parameters that are adapted without a layer (`target_parameters`).

PEFT wraps the module that holds such a parameter, and wraps the wrapper again for each further parameter. So the
factors of the module's last parameter are under the module's path, those of the parameter before it under
`base_layer`, and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfx.adapters.files.names import name_of
from peftfx.contract.common.experts import transposed_factors
from peftfx.contract.common.low_rank import A, B
from peftfx.contract.method import Method, Params
from peftfx.contract.placed import Placed
from peftfx.contract.placement import Placement, owner_of
from peftfx.graph.places import has_module
from peftfx.rules.parameters import TARGET_PARAMETERS, picks
from peftfx.rules.peft_files import Weights
from peftfx.sites.expression import ALL_LINEAR
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


def naming_parameters(base: nn.Module, method: Method, names: Mapping[str, str]) -> Method:
    """Return a rule whose `target_parameters` are these names, or the rule itself if it names them already.

    Args:
        base: the base.
        method: the rule. Modules that it names itself are named anew if these parameters are theirs: HF PEFT would put
            a layer there first.
        names: the names of the parameters, by the paths of their sites.
    """
    if not names or (method.target is None and method.target_parameters):
        return method
    own = method.target_modules not in (None, ALL_LINEAR) and any(has_module(base, path) for path in names)
    others = {"target_modules": ()} if own else {}
    return dataclasses.replace(method, **{TARGET_PARAMETERS: tuple(sorted(names.values()))}, **others)  # type: ignore[arg-type]


def exchange_read(base: nn.Module, weights: Weights, placements: Iterable[Placement]) -> None:
    """Give LoRA's factors in the place of a file's, where HF PEFT reads a parameter the other way round."""
    for placement in placements:
        if is_exchanged(base, placement):
            path = parameter_path(base, placement.method, placement.site.path)
            names = {name: name_of(path, suffix) for name, suffix in placement.file_suffixes().items()}
            if set(names.values()) <= weights.names.keys():
                read = exchanged(placement.site, {own: weights[name] for own, name in names.items()})
                weights.replace({names[own]: value for own, value in read.items()})


def exchanged(site: Site, p: Params) -> dict[str, Tensor]:
    """Return the factors of a LoRA whose update is the transpose of this one's: its A is made of this B."""
    count = site.shape[0] if site.kind == EXPERTS else 1
    return {**p, **dict(zip((A, B), transposed_factors(count, p[A], p[B]), strict=True))}


def is_exchanged(base: nn.Module, placement: Placement) -> bool:
    """Return whether HF PEFT reads a parameter's storage order, (in, out), the other way round, so that its A is our B.

    For experts, HF PEFT reads the storage order from the module's `is_transposed`. A single weight is always taken for
    [out, in]; an embedding's is [tokens, out].
    """
    site = placement.site
    if site.kind != EXPERTS:
        return (site.transposed or site.kind == "embedding") and picks(placement.method, site.parameter)
    return bool(getattr(owner_of(base, site.path)[0], "is_transposed", False)) != site.transposed


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
