"""Late changes: modules that a call runs and that the call from which an adapter was placed did not run, and modules
that other code has put into others since then."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from peftfx.adapters.adapter import Adapter
from peftfx.analysis.running import region_reads
from peftfx.analysis.unreached import is_unreached
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError, how_many
from peftfx.graph.graph import Graph
from peftfx.rules.placements import placements_of
from peftfx.sites.sites import Sites


def refuse_late(base: nn.Module, adapter: Adapter, sites: Sites) -> None:
    """Refuse a call that uses modules which an adapter's rules or its file name but which have none of its parameters.

    Args:
        base: the base of the adapter.
        adapter: the adapter; one that was loaded from a file is never refused.
        sites: the sites of the graph of this call.

    Raises:
        PeftfxError: there are such modules.
    """
    if read := sorted(adapter.unread & {*sites.reads, *(site.path for site in sites)}):
        modules = how_many(len(read), "module")
        what = (
            f"this call uses the outputs of {modules} left out of the adapter, because no call had used these outputs"
        )
        hint = "load the adapter with inputs= of a call that uses them"
        raise PeftfxError(what, ", ".join(read[:4]), hint)
    late = {site.path for site in sites} - adapter.ran if adapter.ran else ()
    if not late:
        return
    named = sorted({path for rule in adapter.rules for path in _picked(base, rule, sites)} & late)
    if named:
        what = (
            f"this call runs {how_many(len(named), 'module')} that a rule picks, and that the model was not adapted at"
        )
        hint = "give transform() inputs= of a call that runs them, or narrow the rule's target"
        raise PeftfxError(what, ", ".join(named[:4]), hint)


def refuse_missed(adapter: Adapter, graph: Graph) -> None:
    """Refuse a graph that reads a weight which the adapter acts on, at a place where the adapter would not act.

    Args:
        adapter: the adapter.
        graph: the graph of this call.

    Raises:
        PeftfxError: the module's weight is made by other code now (a parametrisation), or some of its calls run under
            torch.autocast.
    """
    paths, found = {p.site.path for p in adapter.placements.weights}, {site.path for site in graph.sites}
    reads = graph.sites.reads  # a parametrisation reads in a module of its own, inside
    missed = {path: reads[p] for path in sorted(paths - found) for p in reads if f"{p}.".startswith(f"{path}.")}
    missed |= {path: why for path, why in region_reads(graph).items() if path in paths}
    refuse_wrapped(graph.base, adapter)
    for path in sorted(missed):
        what = f"the adapter would not act at each call of this module: {missed[path]}"
        raise PeftfxError(what, path, "use road='modules'; or leave the module out of the adapter")


def refuse_wrapped(base: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter some of whose layers are inside other modules now, which have the layers' paths.

    Args:
        base: the base of the adapter, or its twin.
        adapter: the adapter.

    Raises:
        PeftfxError: there are such layers, as after `peft.inject_adapter_in_model`.
    """
    modules = dict(own_modules(base, remove_duplicate=False))
    found: dict[str, type[nn.Module]] = {}
    for site in (placement.site for placement in adapter.placements.weights):
        owner, _, weight = site.parameter.rpartition(".")
        if (module := modules.get(owner)) is not None and _only_wraps(module, weight):
            found[site.path] = type(module)
    if found:
        first, kind = next(iter(found.items()))
        what = (
            f"since the base was adapted, other code has put {how_many(len(found), 'layer')} of the adapter into a "
            f"module of its own ({kind.__module__}.{kind.__qualname__}): the adapter would not act there"
        )
        hint = (
            "take these modules out again (peft: unload() of the model that it made), or give peft a copy of the base"
        )
        raise PeftfxError(what, first, hint)


def _only_wraps(module: nn.Module, weight: str) -> bool:
    """Return whether a module has no tensor of its own, but a module in it that has a weight of this name."""
    if is_parametrized(module) or any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        return False
    return any(weight in inner._parameters for inner in module.modules())


def may_run_late(base: nn.Module, adapter: Adapter, sites: Sites) -> str:
    """Return a text that names a module which another call may run and a rule would pick by role, or "".

    On the graph road `refuse_late` checks each call. The modules road checks no call, so an adapter for which this text
    is not empty must not take it. The text is empty if every module with parameters has run or provably cannot run, or
    if no rule picks by role.
    """
    if unread := adapter.unread:
        return f"{min(unread)}: the call that the adapter was loaded with uses nothing of it, and another call may"
    by_role = any(rule.targeted and rule.target_modules is None for rule in adapter.rules)
    if not adapter.ran or not by_role:
        return ""
    seen = {*adapter.ran, *sites.reads}
    for path, module in own_modules(base):
        if path in seen or not any(True for _ in module.parameters(recurse=False)):
            continue
        if not is_unreached(base, path):
            return f"{path}: the call that the adapter was placed from does not run it, and another call may"
    return ""


def _picked(base: nn.Module, rule: Method, sites: Sites) -> set[str]:
    if not rule.targeted:
        return set()
    try:
        return {placement.site.path for placement in placements_of(rule, base, sites)}
    except PeftfxError:  # the rule picks nothing in this call, or its pick was refused when the rules were placed
        return set()
