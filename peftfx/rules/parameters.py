"""The option `target_parameters`: parameters that a rule names directly, as HF PEFT's LoRA names experts' weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.rules.unplaced import why_no_place
from peftfx.sites.expression import ends_with, ends_with_any
from peftfx.sites.site import Site
from peftfx.sites.sites import Sites
from peftfx.sites.target import BY_PARAMETER

TARGET_PARAMETERS = "target_parameters"


def picks(method: Method, parameter: str) -> bool:
    """Return whether a rule's `target_parameters` name this parameter."""
    return ends_with_any(parameter, method.target_parameters or ())


def as_parameter(method: Method, site: Site) -> Site:
    """Return a site with the name by which HF PEFT's patterns know its parameter, if the rule names the parameter."""
    return dataclasses.replace(site, path=site.parameter) if picks(method, site.parameter) else site


def refuse_read_past(sites: Sites, method: Method, adapted: Iterable[Site]) -> None:
    """Refuse a rule on a parameter that the model's code also reads for something else, where no adapter would act.

    Raises:
        PeftfxError: there is such a parameter.
    """
    for site in adapted:
        how = sites.read_past.get(site.parameter)
        if how and (site.path == site.parameter or picks(method, site.parameter)):
            what = f"the model's code reads this parameter in another place too ({how}), where no adapter would act"
            raise PeftfxError(what, site.parameter, "leave it out of the rule, or name the module that has it")


def refuse_unknown_parameters(base: nn.Module, method: Method, sites: Sites) -> None:
    """Refuse `target_parameters` that name a parameter without a site, or no parameter of the model.

    Raises:
        PeftfxError: there is such a name; the message says why it has no site.
    """
    if not method.target_parameters:
        return
    known = {site.parameter for site in sites if site.kind in BY_PARAMETER}
    every = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    for name in method.target_parameters:
        named = [parameter for parameter in every if ends_with(parameter, name)]
        if not named:
            hint = "name it as the model does: `experts.down_proj`"
            raise PeftfxError("target_parameters name none of the model's", name, hint)
        left = next((parameter for parameter in named if parameter not in known), None)
        if left is not None:
            owner = left.rpartition(".")[0]
            kind = next((site.kind for site in sites if site.parameter == left and site.kind in method.kinds), None)
            if kind is not None:
                what = f"target_parameters name weights of {' or '.join(BY_PARAMETER)}, and this is one of {kind}"
                raise PeftfxError(what, left, f"name its module in target_modules: {owner.rpartition('.')[2]}")
            why = why_no_place(owner, base, sites, method.kinds) or "it is no linear weight"
            hint = "experts can where only products read them: model.set_experts_implementation('grouped_mm')"
            raise PeftfxError(f"this parameter cannot be adapted here: {why}", left, hint)
