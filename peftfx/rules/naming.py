"""The path by which HF PEFT's options know a site, if that differs from the path of the site's module."""

from __future__ import annotations

import dataclasses

from torch import nn

from peftfx.contract.method import Method
from peftfx.contract.override import tied_embedding
from peftfx.rules.torch_attention import wrapper_of
from peftfx.sites.expression import ALL_LINEAR
from peftfx.sites.site import Site


def as_named(base: nn.Module, method: Method, site: Site) -> Site:
    """Return a site with the path by which HF PEFT's `target_modules`, and patterns over modules, know it."""
    if method.target_modules is None or method.target_modules == ALL_LINEAR:
        return site
    owner = wrapper_of(base, method, site.path) or tied_embedding(base, method, site)
    return dataclasses.replace(site, path=owner) if owner else site
