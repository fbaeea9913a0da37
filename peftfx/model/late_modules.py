"""Late modules: those that a call runs, and that the call from which an adapter's rules were placed did not run."""

from __future__ import annotations

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import Method
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.rules.resolution import placements_of
from peftfx.sites.sites import Sites


def refuse_late(base: nn.Module, adapter: Adapter, sites: Sites) -> None:
    """Refuse a call that runs modules which the rules of a new adapter pick, and which have none of its parameters.

    Args:
        sites: of the graph of this call.

    Raises:
        PeftfxError: there are such modules.
    """
    late = {site.path for site in sites} - adapter.ran if adapter.ran else ()
    if not late:
        return
    named = sorted({path for rule in adapter.rules for path in _picked(base, rule, sites)} & late)
    if named:
        what = f"this call runs {len(named)} modules that a rule picks, and that the model was not adapted at"
        hint = "give transform() inputs= of a call that runs them, or narrow the rule's target"
        raise PeftfxError(what, ", ".join(named[:4]), hint)


def _picked(base: nn.Module, rule: Method, sites: Sites) -> set[str]:
    if isinstance(rule, SequenceMethod):
        return set()
    try:
        return {placement.site.path for placement in placements_of(base, rule, sites)}
    except PeftfxError:  # it picks nothing in this call, or what it picks was refused when the rules were placed
        return set()
