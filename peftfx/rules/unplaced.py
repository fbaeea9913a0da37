"""Modules that a rule or a file names but that have no site: they are refused, or a warning names them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfx.analysis.running import READ_BY_ATTENTION
from peftfx.analysis.unreached import is_unreached
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError, listed, warn
from peftfx.graph.places import has_module
from peftfx.rules.naming import as_named
from peftfx.rules.torch_attention import cut_attentions, is_read_by_attention
from peftfx.sites.expression import ALL_LINEAR
from peftfx.sites.site import Site, WeightSite, layer_of
from peftfx.sites.sites import Sites
from peftfx.sites.target import Where, explain

_MOST = 4


def refuse_unplaced(
    base: nn.Module, method: Method, sites: Sites, where: Where, done: Collection[str], *, loaded: bool = False
) -> None:
    """Refuse a rule whose `target_modules` name modules with weights that have no site here.

    Args:
        base: the base.
        method: the rule.
        sites: the base's sites.
        where: the rule's options that say where it applies.
        done: module paths where the rule acts, or whose modules it trains whole.
        loaded: whether the rule is a file's, whose reader counts modules that do not run or reach no output.

    Raises:
        PeftfxError: such a module runs, or may run in another call, or HF PEFT counts it (`Method.counted`).
    """
    named = named_elsewhere(base, method, sites, where, done)
    idle = [path for path in named if never_runs(path, base, sites) or (loaded and path in sites.unread)]
    if idle and done and method.counted and not loaded:
        what = f"no call of the model runs these, and what {type(method).__name__} has elsewhere depends on them"
        raise PeftfxError(what, ", ".join(idle[:_MOST]), "exclude them, by exclude_modules or by narrower targets")
    reasons = {path: why_no_place(path, base, sites, method.kinds) for path in named if path not in idle}
    if reasons:
        told = listed([f"{path}: {why}" for path, why in reasons.items()], _MOST, "; ")
        hint = "narrow target_modules (exclude_modules), or, in Python, pass inputs= of a call that runs them"
        raise PeftfxError(f"target_modules name modules that cannot be adapted here: {told}", "rules", hint)
    if idle:
        told = "the outputs do not depend on" if loaded else "no call of the model runs"
        read = [path for own in idle for path in _readers(own, base, sites)]
        more = f"; the model reads this weight in {listed(read, _MOST)}: name these" if read else ""
        warn(f"{told} {', '.join(idle[:_MOST])}: nothing is adapted there{more}")


def is_idle(path: str, base: nn.Module, sites: Sites) -> bool:
    """Return whether the call that sites were found in does not run a module, or uses nothing of what it computes.

    A module that provably never runs is not idle.

    Args:
        path: the module's path.
        base: the base.
        sites: the base's sites.
    """
    if path in sites.unread:
        return True
    unused = path not in sites.called and path not in sites.reads and has_module(base, path)
    return unused and not never_runs(path, base, sites)


def _readers(path: str, base: nn.Module, sites: Sites) -> list[str]:
    """Return the sites that have the weight of the module at a path under another name, as T5's embeddings."""
    weight = getattr(base.get_submodule(path), "weight", None)
    others = (s.path for s in sites if s.weight and has_module(base, s.path))
    return [p for p in others if weight is not None and getattr(base.get_submodule(p), "weight", None) is weight]


def named_elsewhere(base: nn.Module, method: Method, sites: Sites, where: Where, done: Collection[str]) -> list[str]:
    """Return the paths of the modules with weights that `target_modules` name and that have no site here.

    See `refuse_unplaced` for the arguments.
    """
    if method.target_modules is None:
        return []
    known = {as_named(base, method, site).path for site in sites if site.weight} | set(done)
    known -= cut_attentions(base, sites)
    linear = method.target_modules == ALL_LINEAR
    candidates = [
        path
        for path, m in own_modules(base)
        if path not in known and method.needs_place(m) and (not linear or isinstance(m, nn.Linear | Conv1D))
    ]
    mark = Site("", "linear", "linear", None, "-", None, (), False, (), ())
    stand_ins = [dataclasses.replace(mark, path=path, layer=layer_of(path)) for path in candidates]
    return [r.site.path for r in explain(stand_ins, **where, kinds=("linear",)) if r.match]


def counted_sites(placed: Sequence[Site], beside: Collection[str], base: nn.Module) -> tuple[Site, ...]:
    """Return the sites of all modules at which HF PEFT has a layer of a rule, in the order of the base's modules.

    Args:
        placed: the sites where the rule acts.
        beside: the paths of the other modules.
        base: the model.

    Returns:
        No sites if all modules are in `placed`, or one of the others is no layer that a site can stand for.
    """
    if not beside:
        return ()
    others = [site_without_calls(path, base) for path in sorted(beside)]
    order = {path: number for number, (path, _) in enumerate(own_modules(base))}
    sites = [*placed, *(site for site in others if site is not None)]
    return () if None in others else tuple(sorted(sites, key=lambda s: order.get(s.path, len(order))))


def site_without_calls(path: str, base: nn.Module) -> WeightSite | None:
    """Return a site for the layer at a path, without calls; None for a module that is no plain layer."""
    module = base.get_submodule(path)
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return None
    kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
    bias = None if getattr(module, "bias", None) is None else f"base.{path}.bias"
    shape, transposed = tuple(module.weight.shape), isinstance(module, Conv1D)
    return WeightSite(path, kind, kind, layer_of(path), f"base.{path}.weight", bias, shape, transposed, (), ())


def refuse_unasked(base: nn.Module, method: Method) -> None:
    """Refuse a method that waits for invocation tokens, in a model that is not a causal model of text."""
    if not method.invoked_by:
        return
    if "input_ids" not in inspect.signature(base.forward).parameters or encodes_and_decodes(base):
        what = "an aLoRA acts behind its invocation in the text of a causal model, and this model has no such text"
        raise PeftfxError(what, type(base).__name__, "leave alora_invocation_tokens out: a plain LoRA acts everywhere")


def tell_elsewhere(sites: Sites, adapted: Collection[str], wrapped: Collection[str]) -> None:
    """Warn of adapted modules that the model also runs under other names, where nothing acts, as in HF PEFT.

    Also warn of adapted modules where HF PEFT's layer may give other outputs (`Sites.passed_by`).

    Args:
        sites: the sites of the model.
        adapted: paths of adapted modules.
        wrapped: those of them that a method adapts which, in HF PEFT, has a layer around whole attentions.
    """
    told = [f"{path} as {', '.join(sites.elsewhere[path])}" for path in sites.elsewhere if path in adapted]
    if told:
        warn(f"the model also runs {listed(told, _MOST, '; ')}: nothing is adapted there, as in HF PEFT")
    unlike: dict[str, list[str]] = {}
    for path in sites.passed_by.keys() & set(adapted):
        if sites.passed_by[path] != READ_BY_ATTENTION or path not in wrapped:
            unlike.setdefault(sites.passed_by[path], []).append(path)
    for why, paths in sorted(unlike.items()):
        warn(f"HF PEFT may give other outputs at {listed(sorted(paths), _MOST)}: {why}")


def tell_read_past(sites: Sites, trained: Iterable[Site]) -> None:
    """Warn of layers whose trained copy is read past their call too: HF PEFT's layer shows the base's tensor there."""
    paths = sorted(site.path for site in trained if site.parameter in sites.read_past)
    if paths:
        why = "the model's code also reads its weight past its call, where HF PEFT's is the base's until it is merged"
        warn(f"HF PEFT may give other outputs at {listed(paths, _MOST)}: {why}")


def never_runs(path: str, base: nn.Module, sites: Sites) -> bool:
    """Return whether it is proven that no call runs the module at this path."""
    if path in sites.called or not has_module(base, path):
        return False
    return is_read_by_attention(base, path) or is_unreached(base, path)


def why_no_place(path: str, base: nn.Module, sites: Sites, kinds: Collection[str]) -> str:
    """Return why a method cannot act at the module of this path; empty if the base has no such module."""
    if not has_module(base, path):
        return ""
    kind = next((site.kind for site in sites if site.path == path), None)
    own = base.get_submodule(path)
    computed = "the model runs it with a weight that is computed from others"
    if hasattr(own, "parametrizations"):
        return f"{computed}: torch.nn.utils.parametrize.remove_parametrizations makes it a plain layer"
    if isinstance(vars(own).get("weight"), Tensor):  # hooks set it: it is neither a parameter nor a buffer
        return f"{computed}: torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove makes it plain"
    names = (s.path for s in sites if s.path != path and has_module(base, s.path) and base.get_submodule(s.path) is own)
    if kind is None and (name := next(names, "")):
        return f"it is one module with {name}, and the model runs it under that name: name that"
    reads = sites.reads.get(path) or next((how for p, how in _inside(sites.reads, path)), "")
    if kind is not None and kind not in kinds and not reads:
        return f"it is of kind {kind} here, and the method acts on {', '.join(sorted(kinds))}"
    if reads:
        return f"the model runs it, but not as a layer that can be adapted: {reads}"
    if path in sites.unread:
        return "the model runs it, and uses nothing of what it computes in this call"
    if path in sites.called:
        return "the model runs it, but its code applies no weight of its own that can be adapted"
    if kind is not None:
        return f"the model's code reads its weight for a {kind} operation, and makes no call of it"
    return "this call does not run it: in Python, pass inputs= of a call that does"


def _inside(reads: Mapping[str, str], path: str) -> Iterator[tuple[str, str]]:
    return ((p, how) for p, how in reads.items() if p.startswith(f"{path}."))
