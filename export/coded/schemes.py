"""Choose the scheme that rounds a weight, from several schemes with targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftfx.errors import PeftfxError
from peftfx.export_options.quantize import Scheme
from peftfx.graph.graph import DERIVED
from peftfx.sites.site import ROUTER, Site
from peftfx.sites.sites import Sites

ROUTER_LEFT = f"it selects experts, and a rounded one may select others; int8@{ROUTER} rounds it"


def scheme_for(sites: Sites, schemes: Sequence[Scheme]) -> Callable[[object], Scheme | None]:
    """Return a function from a weight's source in the graph to the last of `schemes` that picks the weight in `sites`.

    A scheme without a target leaves routers in floating point: the output jumps where a rounded router selects another
    expert.

    Raises:
        PeftfxError: a target picks no site, or only some rows of a fused weight.
    """
    everywhere = next((scheme for scheme in reversed(schemes) if not scheme.target), None)
    chosen: dict[object, Scheme | None] = {}
    for scheme in schemes:
        if not scheme.target:
            chosen = dict.fromkeys(routers_in(sites))
            continue
        for match in sites.select(scheme.target):
            if match.parts:
                hint = "name the whole of it, by its path say"
                what = f"a weight is rounded whole, and {scheme.target} picks {', '.join(match.parts)} of one"
                raise PeftfxError(what, match.site.path, hint)
            chosen |= dict.fromkeys(_sources(match.site), scheme)

    def choose(source: object) -> Scheme | None:
        found = chosen.get(source, everywhere)
        return None if found is None or found.kind == "none" else found

    return choose


def routers_in(sites: Sites) -> set[str]:
    """Return the sources of the weights of all routers."""
    return {source for site in sites.filter(role=ROUTER) for source in _sources(site)}


def _sources(site: Site) -> tuple[str, str]:
    """Return the sources that a site's weight may have in a graph: the base's own, and the merged one."""
    return site.weight, f"{DERIVED}.{site.path}.weight"
