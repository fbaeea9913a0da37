"""The laws of slots and rows: filled slots equal an inserted adapter, and a row equals the model with its adapter."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from peftfx.contract.broadcast import along_columns, along_rows
from peftfx.contract.common.low_rank import dense
from peftfx.contract.placement import WeightPlacement, site_tensors
from peftfx.contract.update import Update
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.graph.slots import INNER, OUTER, SLOT_A, SLOT_B, Slot, shapes
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.adaptation.evaluate import Evaluate
from peftfx.passes.rewriting.site_op import bind
from peftfx.passes.slots.by_row import ByRow
from peftfx.passes.slots.layer_by_row import BIAS_STACK
from peftfx.passes.slots.open import Open, slots_of, slotted
from peftfx.sites.site import WEIGHT_KINDS, Site
from peftfx.testing.arithmetic import input_of
from peftfx.testing.cases import Case
from peftfx.testing.pool import captured
from peftfx.testing.setup import adapt, assert_close


@torch.no_grad()
def slot_fold(case: Case) -> None:
    """A layer with slots equals the layer with the weight that the slots make, at every kind of site; in float64."""
    graph, rng = captured(case.spec).graph, torch.Generator().manual_seed(case.seed)
    nodes = {node.name: node for node in graph.nodes()}
    for site in (site for site in graph.sites if site.kind in WEIGHT_KINDS):
        stored, bias = site_tensors(graph.base, site)
        stored, bias = stored.double(), None if bias is None else bias.double()
        given = {what: torch.randn(_sized(shape), generator=rng).double() for what, shape in shapes(site).items()}
        node, x = nodes[site.calls[0].op], input_of(case, site, rng)
        inner = () if site.kind == "embedding" else (given[INNER],)
        got = slotted(site, node)(x, stored, bias, given[SLOT_A], given[SLOT_B], given[OUTER], *inner)
        weight = _folded(site, stored, given[SLOT_A], given[SLOT_B], given[OUTER], *inner)
        assert_close(got, bind(node, site)(x, weight, bias), 1e-6, f"slots at {site.path}")


def _sized(shape: tuple[int | str, ...]) -> list[int]:
    return [2 if isinstance(size, str) else size for size in shape]


def _folded(site: Site, stored: Tensor, a: Tensor, b: Tensor, outer: Tensor, inner: Tensor | None = None) -> Tensor:
    if site.kind == "embedding":
        return stored * outer + a @ b
    weight = dense(stored.T if site.transposed else stored, site.groups)
    assert inner is not None
    scaled = weight * along_rows(outer, weight) * along_columns(inner, weight, groups=1)
    return scaled + (torch.einsum("or...,ri...->oi...", b.flatten(1), a) if site.kind == "conv" else (a @ b).T)


def _updates_of(adapted: AdaptedModel) -> dict[str, tuple[Site, Update]]:
    """Return the adapter's update at each site, by the site's path."""
    adapter, found = adapted.adapter("default"), dict[str, tuple[Site, Update]]()
    for placement in adapter.placements.weights:
        site, method = placement.site, placement.method
        base = placement.base(*site_tensors(adapted.base, site))
        update = method.update(placement.view, base, adapter.params(placement))
        if placement.block is not None:
            update = _spread(update, placement, *site_tensors(adapted.base, site))
        found[site.path] = site, found[site.path][1].then(update) if site.path in found else update
    return found


def _spread(update: Update, placement: WeightPlacement, weight: Tensor, bias: Tensor | None) -> Update:
    """Return an update of a part's rows as an update of the whole weight, with the part's bias in the whole bias."""
    site, block = placement.site, placement.block
    assert block is not None
    rows = weight.shape[1 if site.transposed else 0]
    spread = update.spread(block, rows, site.path)
    if update.bias is None:
        return spread
    whole = update.bias.new_zeros(rows) if bias is None else bias
    return dataclasses.replace(spread, bias=block.put(whole, update.bias, 0))


@torch.no_grad()
def slots(case: Case, method: WeightMethod) -> None:
    """A graph with an adapter in its slots equals the graph with the adapter inserted; with empty slots, the base's."""
    adapted, inputs = adapt(case, method), tuple(case.inputs().values())
    try:
        told = _updates_of(adapted)
    except PeftfxError:  # the update scales inputs that only some rows of a fused weight read
        return
    if any(update.bias is not None for _, update in told.values()) or adapted.adapter("default").overrides:
        return  # biases and overrides have no slots: in an exported program they replace the base's own tensors
    scaled = tuple(path for path, (site, _) in told.items() if site.kind != "embedding")
    opened = Open(tuple(told), scaled)(adapted.graph(adapted=False)).graph
    opened.lint()
    filled = [_filled(slot, *told[slot.at]) for slot in slots_of(opened, ())]
    (want,), (got,) = adapted.graph().run(*inputs), opened.run(*inputs, *filled)
    assert_close(got, want, 1e-4, "filled")
    empty = [_filled(slot, told[slot.at][0], Update()) for slot in slots_of(opened, ())]
    (want,), (got,) = adapted.graph(adapted=False).run(*inputs), opened.run(*inputs, *empty)
    assert_close(got, want, 1e-6, "empty")


def _filled(slot: Slot, site: Site, update: Update) -> Tensor:
    a, b = update.factors(site)
    value = {SLOT_A: a, SLOT_B: b, INNER: update.inner, OUTER: update.outer}[slot.what]
    return (torch.ones if slot.what in (INNER, OUTER) else torch.zeros)(slot.empty) if value is None else value


@torch.no_grad()
def rows(case: Case, method: WeightMethod) -> None:
    """Rows of a batch with an adapter equal the adapted model's rows, and rows without one equal the base's."""
    adapted, inputs = adapt(case, method), tuple(case.inputs().values())
    try:
        told = [(site, update, site_tensors(adapted.base, site)[1]) for site, update in _updates_of(adapted).values()]
        stacks = {key: value for one in told for key, value in _stacked(*one)}
        by_row = Evaluate()(ByRow(stacks)(adapted.graph(adapted=False)).graph).graph
    except PeftfxError:  # the layer does not keep the rows apart, as position embeddings do not
        return
    if adapted.adapter("default").overrides:
        return
    by_row.lint()
    ids = torch.arange(case.batch) % 2 - 1
    (got,), (own,) = by_row.run(*inputs, ids), adapted.graph().run(*inputs)
    (none,) = adapted.graph(adapted=False).run(*inputs)
    for row, number in enumerate(ids.tolist()):
        assert_close(got[row], (none if number < 0 else own)[row], 1e-4, f"row {row}")


def _stacked(site: Site, update: Update, bias: Tensor | None) -> list[tuple[tuple[str, str], Tensor]]:
    """Return a stack of two entries for each tensor: no adapter (with the base's own bias), and this adapter."""
    a, b = update.factors(site)
    ones = {INNER: update.inner, OUTER: update.outer}
    found = {what: torch.stack([torch.ones_like(value), value]) for what, value in ones.items() if value is not None}
    zeros = {SLOT_A: a, SLOT_B: b}
    found |= {what: torch.stack([torch.zeros_like(v), v]) for what, v in zeros.items() if v is not None}
    if update.bias is not None:
        own = torch.zeros_like(update.bias) if bias is None else bias.to(update.bias.dtype)
        found[BIAS_STACK] = torch.stack([own, update.bias])
    return [((site.path, what), value) for what, value in found.items()]
