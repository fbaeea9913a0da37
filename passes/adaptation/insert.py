"""Insert adapters into a graph. Each method's `forward` is traced once for each signature, and spliced in."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import fx

from peftfx.adapters.adapter import Adapter
from peftfx.analysis.running import Owners, owners_of, owners_read
from peftfx.analysis.weight_ops import module_path, own_name
from peftfx.contract.override import Override
from peftfx.contract.placement import (
    AttentionPlacement,
    PatternPlacement,
    Placement,
    SequencePlacement,
    WeightPlacement,
)
from peftfx.graph.contexts import isolated, sparing
from peftfx.graph.graph import ADAPTERS, BASE, Graph
from peftfx.passes.adaptation.attention import join
from peftfx.passes.adaptation.pattern import apply_at_match, refuse_within_layers
from peftfx.passes.adaptation.sequence import TARGET, first_operation, trace_virtual
from peftfx.passes.adaptation.weight import apply_at
from peftfx.passes.base import Pass, PassResult, fake_like
from peftfx.passes.rewriting.splice import Splicer


@dataclass(frozen=True, eq=False)
class Insert(Pass):
    """Apply an adapter at every call of its sites, and replace the base's tensors by the adapter's overrides.

    Attributes:
        name: the adapter's name. Its tensors are read from `adapters.<name>.`.
        adapter: the adapter to insert.
    """

    name: str
    adapter: Adapter

    def __call__(self, graph: Graph) -> PassResult:
        graph = graph.clone()
        splicer = Splicer(graph, self.name, self.adapter)
        # Attentions add calls to projections. They come first, so that all calls of a projection are adapted.
        first = self.adapter.placements.attentions
        ordered = (*first, *(p for p in self.adapter.placements if p not in first))
        with isolated(graph.base), sparing(graph.base):
            changed = _override(splicer) + sum(_insert(p, splicer) for p in ordered)
        refuse_within_layers(graph)
        splicer.rewriter.close(graph)
        return PassResult(graph, changed)


def _override(splicer: Splicer) -> int:
    """Read the adapter's own tensors where the overridden modules read the base's."""
    targets = _targets_by_tensor(splicer)
    wanted: dict[str, list[Override]] = {}
    for override in splicer.adapter.overrides:
        module = splicer.graph.base.get_submodule(override.module)
        owner, _, leaf = override.name.rpartition(".")
        tensor = getattr(module.get_submodule(owner), leaf)
        for target in targets.get(id(tensor), ()):
            wanted.setdefault(target, []).append(override)
    changed, owners = 0, owners_of(splicer.graph.base) if wanted else {}
    for target, choices in wanted.items():
        node, tensor = splicer.attributes[target], splicer.graph.get(target)
        made: dict[tuple[str, ...], fx.Node] = {}
        for user in list(node.users):
            path, own, key = module_path(user), node, tuple[str, ...]()
            for kind in (False, True):  # a whole copy, and then rows in its place, or in that of the base's tensor
                of_kind = (o for o in choices if bool(o.rows) == kind)
                found = next((o for o in of_kind if _reads(splicer.graph, path, o, tensor, owners)), None)
                if found is not None:
                    key += (found.key,)
                    own = made[key] if key in made else made.setdefault(key, _own(splicer, found, own, target))
            if own is not node:
                user.replace_input_with(node, own)
                changed += 1
    return changed


def _reads(graph: Graph, path: str, override: Override, tensor: torch.Tensor, owners: Owners) -> bool:
    """Return whether code of the module at `path` reads an override's tensor.

    That is code inside the override's module, and code of another module that reads the tensor from there.
    """
    if f"{path}.".startswith(f"{override.module}." if override.module else ""):
        return True
    if own_name(graph.base, path, tensor) is not None:
        return False
    held = [holder for holder, _ in owners_read(owners.get(id(tensor), []), path)]
    return bool(held) and all(f"{h}.".startswith(f"{override.module}.") for h in held)


def _own(splicer: Splicer, override: Override, node: fx.Node, of: str) -> fx.Node:
    """Return the node that replaces the base's tensor: the adapter's tensor, or `node` with the adapter's rows.

    `of` is the target of the base's tensor.
    """
    if not override.rows:
        return splicer.attribute(f"{ADAPTERS}.{splicer.name}.{override.key}", node.meta["val"], overrides=of)
    indices, rows = (
        splicer.attribute(f"{ADAPTERS}.{splicer.name}.{key}", fake_like(node.meta["val"], splicer.adapter.get(key)))
        for key in (override.indices, override.key)
    )
    at = splicer.rewriter.before(first_operation(splicer.rewriter.graph), node, overrides=of)
    if rows.meta["val"].dtype != node.meta["val"].dtype:
        rows = at.call(torch.ops.aten.to.dtype, rows, node.meta["val"].dtype)
    return at.call(torch.ops.aten.index_put.default, node, [indices], rows)


def _targets_by_tensor(splicer: Splicer) -> dict[int, list[str]]:
    """Return the targets under which the graph reads each of the base's tensors, by the tensors' ids."""
    found: dict[int, list[str]] = {}
    for target in splicer.attributes:
        if target.startswith(f"{BASE}."):
            found.setdefault(id(splicer.graph.get(target)), []).append(target)
    return found


@functools.singledispatch
def _insert(placement: Placement, splicer: Splicer) -> int:
    """Splice a placement in at each call of its site in this view. Return the number of calls."""
    return 0  # this placement only has copies, which are in place already


@_insert.register
def _(placement: AttentionPlacement, splicer: Splicer) -> int:
    return join(splicer, placement)


@_insert.register
def _(placement: WeightPlacement, splicer: Splicer) -> int:
    site = splicer.sites.get(placement.site.path)  # not in every view: with `inputs_embeds`, no embedding runs
    if site is None:
        return 0
    for call in splicer.called(site).calls:
        apply_at(splicer, placement, call, splicer.name, splicer.adapter)
    splicer.note(splicer.name, placement)
    return len(site.calls)


@_insert.register
def _(placement: PatternPlacement, splicer: Splicer) -> int:
    return apply_at_match(splicer, placement)


@_insert.register
def _(placement: SequencePlacement, splicer: Splicer) -> int:
    # A soft prompt goes into the hole of the entry that this view was captured through, if it has one.
    hole = splicer.attributes.get(TARGET)
    if hole is None:  # the view has no prompt, or another pass fills it
        return 0
    params = splicer.parameters(placement, splicer.name, splicer.adapter, hole)
    fake = [n.meta["val"] for n in params.values()]
    traced = trace_virtual(placement.method, hole.meta["val"], list(params), fake, training=splicer.graph.training)
    region = splicer.region(placement, splicer.name, hole, params)
    users = list(hole.users)
    first = first_operation(splicer.rewriter.graph)
    result = splicer.at(first, hole, region).splice(traced, list(params.values()))
    splicer.replace(hole, result, users)
    return 1
