"""Choose the scheme that rounds a weight, from several schemes with targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftfx.errors import PeftfxError
from peftfx.export_options.quantize import Scheme
from peftfx.graph.graph import DERIVED
from peftfx.sites.sites import Sites


def scheme_for(sites: Sites, schemes: Sequence[Scheme]) -> Callable[[object], Scheme | None]:
    """Return a function from a weight's source in the graph to the last of `schemes` that picks the weight in `sites`.

    Raises:
        PeftfxError: a target picks no site, or only some rows of a fused weight.
    """
    everywhere = next((scheme for scheme in reversed(schemes) if not scheme.target), None)
    chosen: dict[object, Scheme] = {}
    for scheme in schemes:
        if not scheme.target:
            chosen.clear()
            continue
        for match in sites.select(scheme.target):
            if match.parts:
                hint = "name the whole of it, by its path say"
                what = f"a weight is rounded whole, and {scheme.target} picks {', '.join(match.parts)} of one"
                raise PeftfxError(what, match.site.path, hint)
            chosen |= dict.fromkeys((match.site.weight, f"{DERIVED}.{match.site.path}.weight"), scheme)

    def choose(source: object) -> Scheme | None:
        found = chosen.get(source, everywhere)
        return None if found is None or found.kind == "none" else found

    return choose
