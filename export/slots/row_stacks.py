"""Stack the tensors of several adapters at each place, so that each row of a batch chooses an entry by a number.

The first entry changes nothing. Ranks and soft prompts are padded to the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peftfx.contract.attention import key_weight
from peftfx.contract.placement import owner_of, site_tensors
from peftfx.contract.update import Update
from peftfx.errors import PeftfxError
from peftfx.export.slots.adapter_tensors import AdapterTensors, adapter_tensors, replaced_layers
from peftfx.graph.graph import BASE
from peftfx.graph.lazy_weights import exact
from peftfx.graph.slots import INNER, KEYS, OUTER, PREFIX, SLOT_A, SLOT_B, SLOT_OWN, SLOT_PROMPT, VALUES
from peftfx.model.adapted import AdaptedModel
from peftfx.options import DECODE
from peftfx.passes.slots.by_row import SHOWN
from peftfx.passes.slots.layer_by_row import BIAS_STACK
from peftfx.sites.site import WEIGHT_KINDS, Site
from peftfx.views.decode import Decode


def told(adapted: AdaptedModel, name: str, *, decodes: bool) -> dict[tuple[str, str], Tensor]:
    """Compute what the adapter `name` does: its prefix, and updates at layers, with trained copies as updates."""
    with adapted.named.acting_as((name,)):
        told = adapter_tensors(adapted, decodes=decodes)
        replaced = replaced_layers(adapted)
    layers = [site for site in adapted.sites if site.kind in WEIGHT_KINDS]
    tables: dict[str, list[Site]] = {}
    for site in (s for s in layers if s.kind in ("linear", "embedding") and s.path in replaced):
        tables.setdefault(replaced[site.path], []).append(site)
    biases = {site.bias.removeprefix(f"{BASE}."): site for site in layers if site.bias}
    paths, every = {site.path for site in layers}, adapted.sites
    run = every.running | every.reads.keys()  # other modules' tensors are not read
    norms = {str(name).removeprefix(f"{BASE}.") for s in every.norms for name in (s.weight, s.bias)}
    made: dict[tuple[str, str], Tensor] = {}
    for (at, what), value in told.items():
        if what != SLOT_OWN:
            made[at, what] = value
        elif at in biases:
            made[biases[at].path, BIAS_STACK] = value
        elif at.endswith(".bias") and at.removesuffix(".bias") in paths:
            made[at.removesuffix(".bias"), BIAS_STACK] = value
        elif at in norms:
            made[at, SLOT_OWN] = value
        elif at not in tables and at.rpartition(".")[0] in run:
            what, hint = f"rows cannot each have a trained copy of {at}", "export the adapter merged"
            raise PeftfxError(what, name, hint)
    for site, value in ((s, told[n, SLOT_OWN]) for n, sites in tables.items() if (n, SLOT_OWN) in told for s in sites):
        made |= _in_stacks(site, _replaced(adapted, site, value).then(_update_in(made, site)))
    return made


def _replaced(adapted: AdaptedModel, site: Site, weight: Tensor) -> Update:
    """Express another weight for a site, such as a head's, as an update: a scale of 0, and a sum that is the weight."""
    stored = site_tensors(adapted.base, site)[0]
    if weight.shape != stored.shape:
        what = f"the adapter's weight is {list(weight.shape)}, and the base's {list(stored.shape)}"
        raise PeftfxError(what, site.path, "adapters of one graph have heads and embeddings of one size")
    own = weight.T if site.transposed or site.kind == "embedding" else weight
    rows, columns = own.shape
    square, none = torch.eye(min(rows, columns), dtype=own.dtype), own.new_zeros(rows)
    return Update(outer=none, a=own, b=square) if rows <= columns else Update(outer=none, a=square, b=own)


def _update_in(made: Mapping[tuple[str, str], Tensor], site: Site) -> Update:
    """Return the update that these tensors tell for a site with a matrix."""
    inner, outer, a, b = (made.get((site.path, what)) for what in (INNER, OUTER, SLOT_A, SLOT_B))
    return Update(inner, outer, None if a is None else a.T, None if b is None else b.T)


def _in_stacks(site: Site, update: Update) -> dict[tuple[str, str], Tensor]:
    """Return the tensors that tell an update for a site with a matrix."""
    a, b = (None if factor is None else factor.T.contiguous() for factor in (update.a, update.b))
    values = {INNER: update.inner, OUTER: update.outer, SLOT_A: a, SLOT_B: b}
    return {(site.path, what): value for what, value in values.items() if value is not None}


def stacks_of_rows(
    adapted: AdaptedModel, each: Sequence[AdapterTensors]
) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], torch.dtype]]:
    """Stack an entry for each adapter after an entry that changes nothing. Shapes are padded to the largest.

    Return the stacks, which are not rounded, and the dtypes that the graph has them in.
    """
    stacks: dict[tuple[str, str], Tensor] = {}
    kinds: dict[tuple[str, str], torch.dtype] = {}
    for place in dict.fromkeys(place for own in each for place in own):
        at, what = place
        given = [own[place] for own in each if place in own]
        shape = [max(sizes) for sizes in zip(*(value.shape for value in given), strict=True)]
        kinds[place] = given[0].dtype if what == SLOT_PROMPT else _dtype(adapted, at, what)
        kind = functools.reduce(torch.promote_types, (value.dtype for value in given), kinds[place])
        neutral = _neutral(adapted, at, what, shape).to(kinds[place])
        rows = [neutral, *(_padded(own[place], shape, what) if place in own else neutral for own in each)]
        stacks[place] = torch.stack([row.to(kind) for row in rows]).detach().cpu()
        if what == KEYS:
            counts = torch.tensor([0, *(own[place].shape[1] if place in own else 0 for own in each)])
            stacks[at, SHOWN] = torch.arange(shape[1])[None] < counts[:, None]
    return stacks, kinds


def _dtype(adapted: AdaptedModel, at: str, what: str) -> torch.dtype:
    if what == PREFIX:
        view = adapted.view(DECODE)
        assert isinstance(view, Decode)
        return view.layers[0].dtype
    if what == SLOT_OWN:
        return _tensor(adapted, at).dtype
    if what in (KEYS, VALUES):
        attention = next(site for site in adapted.sites.headed if site.path == at)
        return key_weight(adapted.base, attention).dtype
    site = adapted.sites.by_path(at)
    return site_tensors(adapted.base, site)[0].dtype


def _tensor(adapted: AdaptedModel, name: str) -> Tensor:
    found = getattr(*owner_of(adapted.base, name))
    assert isinstance(found, Tensor)
    return found


def _neutral(adapted: AdaptedModel, at: str, what: str, shape: Sequence[int]) -> Tensor:
    """Return the entry that changes nothing at a place."""
    if what in (INNER, OUTER):
        return torch.ones(shape)
    if what == SLOT_OWN:
        return exact(_tensor(adapted, at)).detach()
    if what == BIAS_STACK:
        bias = site_tensors(adapted.base, adapted.sites.by_path(at))[1]
        return torch.zeros(shape) if bias is None else exact(bias).detach()
    return torch.zeros(shape)


def _padded(value: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """Pad a tensor with zeros at its end, or at its start if it is a prefix."""
    padded = value.new_zeros(*shape)
    if what == PREFIX:
        padded[len(padded) - len(value) :] = value
    else:
        padded[tuple(slice(size) for size in value.shape)] = value
    return padded
