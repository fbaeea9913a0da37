"""Compute what active adapters do as tensors, by the place and the kind of slot that each tensor goes to.

Each method says what its tensors are in a slot (`WeightMethod.update`, `AttentionMethod.beside`). In the decode view, a
soft prompt is the keys and values before the past ones. Scales, ranks and alphas are folded in, and so are the weights
of weighted sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.method import Base
from peftfx.contract.override import Override
from peftfx.contract.placed import Placements
from peftfx.contract.placement import WeightPlacement, owner_of, part_of, site_tensors
from peftfx.contract.update import Update
from peftfx.contract.weight import widened
from peftfx.errors import PeftfxError
from peftfx.export.verification.tolerances.float64 import float64
from peftfx.graph.graph import DERIVED, Graph
from peftfx.graph.lazy_weights import exact
from peftfx.graph.slots import INNER, KEYS, OUTER, PREFIX, SLOT_A, SLOT_B, SLOT_OWN, SLOT_PROMPT, VALUES
from peftfx.model.adapted import AdaptedModel
from peftfx.options import DECODE
from peftfx.passes.adaptation.attention import split_heads
from peftfx.passes.adaptation.pattern_weights import Folds, foldable
from peftfx.passes.adaptation.prefill import NAME
from peftfx.sites.site import Site, WeightSite
from peftfx.views.entry import VirtualTokens

AdapterTensors = dict[tuple[str, str], Tensor]
"""Tensors by a path and the kind of slot there."""


def adapter_tensors(adapted: AdaptedModel, *, decodes: bool) -> AdapterTensors:
    """Compute the tensors of the active adapters: at layers, at attentions, before the text, and trained copies.

    Args:
        adapted: the model.
        decodes: whether the graph is a decode view, in which every soft prompt is a prefix of keys and values.
    """
    own = {_named(o): adapted.adapter(n).get(o.key) for n, o in _overrides(adapted) if not o.rows}
    weights = {path: own[name] for path, name in replaced_layers(adapted).items()}
    updates = _updates_of(adapted, own, weights)
    wanted = {(name, SLOT_OWN): value for name, value in own.items() if not _unchanged(adapted, name, value)}
    wanted |= _updated(adapted, updates)  # after the copies: the updated bias of a layer replaces its trained copy
    return wanted | _beside(adapted, updates, own, weights) | ahead(adapted, decodes)


def replaced_layers(adapted: AdaptedModel) -> dict[str, str]:
    """Return the paths of layers whose whole weight the active adapters replace, each with the name of the copy.

    A copy within a module is for the layers in it; the other layers that share the weight keep the base's.
    """
    found: dict[str, str] = {}
    for override in (o for _, o in _overrides(adapted) if not o.rows):
        table = getattr(*owner_of(adapted.base, _named(override)), None)
        found |= dict.fromkeys((s.path for s in _readers(adapted, override.module, table)), _named(override))
    return found


def _readers(adapted: AdaptedModel, module: str, table: object) -> Iterator[WeightSite]:
    """Yield the layers in a module, by its path, whose weight is this tensor."""
    inside = (site for site in adapted.sites.weights if f"{site.path}.".startswith(f"{module}." if module else ""))
    return (site for site in inside if table is not None and site_tensors(adapted.base, site)[0] is table)


def _named(override: Override) -> str:
    """Return the name of the base's tensor. A norm's weight may be a bare parameter, within no module of its own."""
    return f"{override.module}.{override.name}".removeprefix(".")


def _overrides(adapted: AdaptedModel) -> Iterator[tuple[str, Override]]:
    return ((name, override) for name in adapted.active for override in adapted.adapter(name).overrides)


def _placements(adapted: AdaptedModel) -> Iterator[tuple[str, Placements]]:
    return ((name, adapted.adapter(name).placements) for name in adapted.active)


def _updates_of(adapted: AdaptedModel, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Update]:
    """Compute what the active adapters do at each site with a weight, composed in order.

    Args:
        adapted: the model with the adapters.
        own: the tensors that replace the base's, by their names.
        weights: the whole weights among them, by the paths of the layers that read them.
    """
    updates = _rows_of(adapted, own)
    for name, placement in ((name, p) for name, placements in _placements(adapted) for p in placements.weights):
        site = placement.site
        before = updates.get(site.path, Update())
        p = adapted.adapter(name).params(placement)
        updates[site.path] = before.then(_update_at(placement, _base(adapted, site, before, own, weights), p))
    if any(placements.patterns for _, placements in _placements(adapted)):
        graph = adapted.whole_graph()
        for site, step in (pair for match in _matches(graph) for pair in match.steps()):
            before = updates.get(site.path, Update())
            updates[site.path] = before.then(step.update(_base(adapted, site, before, own, weights), graph.get))
    return updates


def _rows_of(adapted: AdaptedModel, own: Mapping[str, Tensor]) -> dict[str, Update]:
    """Compute what trained rows of a table change at the layers that read it: embeddings, and heads tied to them.

    It is a low-rank sum with a rank for each trained token: one factor names the tokens, and the other is what their
    rows differ by: from the table's, or from those of the whole table of `own` that replaces it.
    """
    found: dict[str, Update] = {}
    whole = {id(getattr(*owner_of(adapted.base, name), None)): value for name, value in own.items()}
    for name, override in ((n, o) for n, o in _overrides(adapted) if o.rows):
        module, tokens = override.module, adapted.adapter(name).get(override.indices)
        table = getattr(*owner_of(adapted.base, f"{module}.{override.name}".removeprefix(".")))
        change = adapted.adapter(name).get(override.key).float() - exact(whole.get(id(table), table)[tokens]).float()
        update = Update(a=F.one_hot(tokens, len(table)).to(change.dtype), b=change.T)
        for site in _readers(adapted, module, table) if change.any() else ():
            turned = update if site.kind == "embedding" else update.turned()
            found[site.path] = found.get(site.path, Update()).then(turned)
    return found


def _matches(graph: Graph) -> list[Folds]:
    """Return what pattern methods fold into layers of a graph, in the order in which they act.

    Raises:
        PeftfxError: a pattern method does something that cannot be folded into a layer.
    """
    found, why = foldable(graph)
    if why:
        what = f"a slot cannot hold what is added at a pattern: {why[0].why}"
        raise PeftfxError(what, why[0].path, "export the adapter merged")
    return found


def _base(
    adapted: AdaptedModel, site: Site, before: Update, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Base:
    """Return a site's weight, [out, in], as the adapters replace it, and the bias after the updates in `before`."""
    weight, bias = site_tensors(adapted.base, site)
    bias = before.bias if before.bias is not None else bias
    if site.bias is not None and before.bias is None:
        bias = own.get(site.bias.partition(".")[2], bias)
    stored = exact(weights.get(site.path, weight))
    return Base(stored.T if site.transposed else stored, None if bias is None else exact(bias).float())


def _update_at(placement: WeightPlacement, base: Base, p: Mapping[str, Tensor]) -> Update:
    method, block = placement.method, placement.block
    if block is None:
        return method.update(placement.view, base, p)
    rows = base.weight.shape[0]
    update = method.update(placement.view, part_of(base, block, 0), p)
    spread = update.spread(block, rows, placement.site.path)
    if update.bias is None:
        return spread
    whole = update.bias.new_zeros(rows) if base.bias is None else base.bias
    return Update(spread.inner, spread.outer, spread.a, spread.b, block.put(whole, update.bias, 0))


def _updated(adapted: AdaptedModel, updates: Mapping[str, Update]) -> AdapterTensors:
    found: AdapterTensors = {}
    for path, update in updates.items():
        site = adapted.sites.by_path(path)
        (a, b), own = update.factors(site), site.bias
        bias = f"{path}.bias" if own is None else own.partition(".")[2]
        made = {(path, what): v for what, v in {SLOT_A: a, SLOT_B: b, INNER: update.inner, OUTER: update.outer}.items()}
        found |= {place: value for place, value in {**made, (bias, SLOT_OWN): update.bias}.items() if value is not None}
    return found


def _beside(
    adapted: AdaptedModel, updates: Mapping[str, Update], own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> AdapterTensors:
    """Compute the keys and values beside attentions, through the projections with their updates."""
    found: AdapterTensors = {}
    for name, placement in ((name, p) for name, placements in _placements(adapted) for p in placements.attentions):
        method, heads = placement.method, placement.site.heads
        p = widened(adapted.adapter(name).params(placement))
        made = []
        for path, rows in ((heads.key, heads.key_rows), (heads.value, heads.value_rows)):
            update = updates.get(path, Update())
            base = _base(adapted, adapted.sites.by_path(path), update, own, weights)
            y = F.linear(method.reads(p), update.apply(base.weight.float()), base.bias)
            made.append(split_heads(y, rows, heads.kept))
        keys, values = method.beside(placement.site, made[0], made[1], p)
        if (placement.site.path, KEYS) in found:
            what = "two adapters stand beside one attention, and a graph has one place there"
            raise PeftfxError(what, placement.site.path, "make one of them active at a time")
        found |= {(placement.site.path, KEYS): keys, (placement.site.path, VALUES): values}
    return found


def ahead(adapted: AdaptedModel, decodes: bool) -> AdapterTensors:
    """Compute a soft prompt, a row for each of its tokens: embeddings, or keys and values."""
    for name, placement in ((name, p) for name, placements in _placements(adapted) for p in placements.prompts):
        embedded = isinstance(adapted.entry(), VirtualTokens)
        if embedded and decodes:
            return {("", PREFIX): adapted.graph(view=DECODE).get(f"{DERIVED}.{NAME}")}
        rows = placement.method.virtual(adapted.adapter(name).params(placement), False)
        return {("", SLOT_PROMPT if embedded else PREFIX): rows}
    return {}


def unrounded_prefix(adapted: AdaptedModel) -> Tensor | None:
    """Compute the keys and values of the active virtual tokens in float64; None if there are no virtual tokens."""
    if not isinstance(adapted.entry(), VirtualTokens):
        return None
    graph = adapted.graph(view=DECODE)
    with torch.no_grad(), float64():
        return graph.derived[NAME].evaluate(graph.get)


def _unchanged(adapted: AdaptedModel, name: str, value: Tensor) -> bool:
    """Say whether a trained copy still equals the base's tensor. Trained rows have a name of their own."""
    tensor = getattr(*owner_of(adapted.base, name), None)
    own = None if tensor is None else exact(tensor)
    return own is not None and own.shape == value.shape and torch.equal(own.to(value), value)
