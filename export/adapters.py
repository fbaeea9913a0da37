"""adapters: the active adapters of a model as the tensors of an `.onnx_adapter` file, for a graph that has slots.

Each method says itself what its tensors are in a slot (`WeightMethod.update`, `AttentionMethod.beside`); a soft prompt
is what is ahead of the past in the decode view. Scales, ranks and alphas are folded in, weights of sums too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.adapted import AdaptedModel
from peftfx.attending import AttentionMethod
from peftfx.entry import VirtualTokens
from peftfx.errors import PeftfxError
from peftfx.export.adapter_files import SUFFIX, file_of, read_adapter_file, write_adapter_file
from peftfx.export.atomic import publish
from peftfx.export.in_eval import in_eval
from peftfx.export.parts import DECODE
from peftfx.export.probes import probes, view_cases
from peftfx.export.verify import reference_of, verify
from peftfx.files import write_file, writing
from peftfx.graph import DERIVED
from peftfx.method import Base, WeightMethod
from peftfx.passes.attend import split_heads
from peftfx.passes.prefill import NAME
from peftfx.placement import SAVED, Override, Placement, owner_of, site_tensors
from peftfx.sites import Site
from peftfx.slots import INNER, KEYS, OUTER, OWN, PREFIX, PROMPT, VALUES, A, B, Manifest, Slot, fingerprint, listed
from peftfx.soft import SequenceMethod
from peftfx.stored import exact
from peftfx.update import Update

Wanted = dict[tuple[str, str], Tensor]
"""What goes where: by a path and what a slot there holds."""


def export_adapter(
    adapted: AdaptedModel, directory: str | Path, output: str | Path, *, check: bool = True, force: bool = False
) -> Path:
    """Write the active adapters as one `.onnx_adapter` for the graph in a directory.

    It is a file, or, for an encoder-decoder's two graphs, a directory with a file for each.

    What the graph computes with it in ONNX Runtime is held against torch, at sizes that no capture saw, before it
    appears.

    Args:
        adapted: the base that the graph was exported from, with its adapters.
        directory: that `peftfx export --swappable` wrote.
        output: where to; it gets the suffix if it has none.
        check: run it.
        force: replace it if it exists.

    Raises:
        PeftfxError: the graph is of another base, or has no place for what an adapter does.
        VerificationError: ONNX Runtime and torch disagree; nothing is left.
    """
    directory, output = Path(directory), Path(output)
    output = output if output.suffix == SUFFIX else output.with_name(output.name + SUFFIX)
    if output.exists() and not force:
        raise PeftfxError("the output exists already", str(output), "pass --force (force=True) to replace it")
    manifest = Manifest.read(directory)
    if fingerprint(adapted.base) != manifest.fingerprint:
        what = f"the graph here is of another base ({manifest.model} from {manifest.base or 'memory'})"
        raise PeftfxError(what, str(directory), "give the base that it was exported from, or export this one")
    with in_eval(adapted):
        tensors = slot_tensors(adapted, manifest)
    write = functools.partial(_write_checked, adapted, directory, manifest, tensors, check)
    if len(manifest.views) > 1:
        with publish(output, force) as temporary:
            write(temporary)
        return output
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, write)
    return output


def _write_checked(
    adapted: AdaptedModel,
    directory: Path,
    manifest: Manifest,
    tensors: Mapping[str, Mapping[str, Tensor]],
    check: bool,
    path: Path,
) -> None:
    for name in manifest.views:
        write_adapter_file(tensors[name], manifest.version, file_of(path, name, tuple(manifest.views)))
    for name, kind in manifest.views.items() if check else ():
        with in_eval(adapted):
            view = adapted.view(kind)
            graph = adapted.graph() if view is None else adapted.graph(view=view)
            cases = probes(adapted, graph.inputs, adapted.example) if view is None else view_cases(adapted, view)
            put = read_adapter_file(file_of(path, name, tuple(manifest.views)))[1]
            verify(
                *(directory / f"{name}.onnx", reference_of(graph), cases),
                atol=manifest.atol,
                rtol=manifest.rtol,
                shown=None if view is None else view.shown,
                put=put,
            )


def slot_tensors(adapted: AdaptedModel, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """What the active adapters put into slots, by graphs and names; slots that they leave alone are not there.

    Raises:
        PeftfxError: there is no slot for something: all that has none is listed.
    """
    if not adapted.active:
        raise PeftfxError("no adapter is active", "export_adapter", "load one, or make one active (set_adapter)")
    slots = manifest.by_place()
    found: dict[str, dict[str, Tensor]] = {graph: {} for graph in manifest.views}
    homeless: dict[str, list[str]] = {}
    for (at, what), value in wanted_of(adapted, decodes=DECODE in manifest.views.values()).items():
        laid = [(slot, _laid(value, slot)) for slot in slots.get((at, what), ())]
        if not laid or any(fitting is None for _, fitting in laid):
            homeless.setdefault(what, []).append(at)
        for slot, fitting in laid:
            found[slot.graph] |= {} if fitting is None else {slot.name: fitting}
    if homeless:
        lines = "; ".join(f"{WORDS[what]} {listed(at)}".strip() for what, at in homeless.items())
        hint = "export the base with --slots that pick these sites, or export the adapter merged"
        hint = "export the adapter merged" if homeless.keys() <= {PROMPT, PREFIX} else hint
        raise PeftfxError(f"the graph has no place for {lines}", manifest.model, hint)
    return found


def wanted_of(adapted: AdaptedModel, *, decodes: bool) -> Wanted:
    """What the active adapters do: at linear layers, beside attentions, ahead of the text, and in the base's place.

    Args:
        adapted: the model.
        decodes: in a decode view, in which any soft prompt is a prefix.
    """
    own = {o.key.removeprefix(f"{SAVED}."): adapted.adapter(n).get(o.key) for n, o in _overrides(adapted)}
    updates = updates_of(adapted, own)
    wanted = {(name, OWN): value for name, value in own.items() if not _unchanged(adapted, name, value)}
    wanted |= _updated(adapted, updates)  # over the copies: a bias of an updated layer counts as it is after that
    return wanted | _beside(adapted, updates, own) | _ahead(adapted, decodes)


WORDS = {
    A: "a low-rank sum at",
    B: "a low-rank sum at",
    OUTER: "a scale of the output of",
    INNER: "a scale of the input of",
    OWN: "a trained copy of",
    KEYS: "keys and values beside",
    VALUES: "keys and values beside",
    PROMPT: "a soft prompt",
    PREFIX: "a soft prompt",
}


def _overrides(adapted: AdaptedModel) -> Iterator[tuple[str, Override]]:
    return ((name, override) for name in adapted.active for override in adapted.adapter(name).overrides)


def _placements(adapted: AdaptedModel) -> Iterator[tuple[str, Placement]]:
    return ((name, placement) for name in adapted.active for placement in adapted.adapter(name).placements)


def updates_of(adapted: AdaptedModel, own: Mapping[str, Tensor]) -> dict[str, Update]:
    """What the active adapters do at each site with a weight, one after another.

    Args:
        adapted: with the adapters.
        own: tensors that stand in the place of the base's, by their names.
    """
    updates: dict[str, Update] = {}
    for name, placement in _placements(adapted):
        method, site = placement.method, placement.site
        if not isinstance(method, WeightMethod):
            continue
        before = updates.get(site.path, Update())
        p = adapted.adapter(name).params(placement)
        updates[site.path] = before.then(_update_at(placement, method, _base(adapted, site, before, own), p))
    return updates


def _base(adapted: AdaptedModel, site: Site, before: Update, own: Mapping[str, Tensor]) -> Base:
    """A site's tensors, [out, in]: the weight as it is stored, the bias as it is after what was before."""
    weight, bias = site_tensors(adapted.base, site)
    bias = before.bias if before.bias is not None else bias
    if site.bias is not None and before.bias is None:
        bias = own.get(site.bias.partition(".")[2], bias)
    stored = exact(weight)
    return Base(stored.T if site.transposed else stored, None if bias is None else exact(bias).float())


def _update_at(placement: Placement, method: WeightMethod, base: Base, p: Mapping[str, Tensor]) -> Update:
    block = placement.block
    if block is None:
        return method.update(placement.view, base, p)
    rows = base.weight.shape[0]
    part = Base(block.take(base.weight, 0), None if base.bias is None else block.take(base.bias, 0))
    update = method.update(placement.view, part, p)
    spread = update.spread(block, rows, placement.site.path)
    if update.bias is None:
        return spread
    whole = update.bias.new_zeros(rows) if base.bias is None else base.bias
    return Update(spread.inner, spread.outer, spread.a, spread.b, block.put(whole, update.bias, 0))


def _updated(adapted: AdaptedModel, updates: Mapping[str, Update]) -> Wanted:
    found: Wanted = {}
    for path, update in updates.items():
        site = adapted.sites.by_path(path)
        (a, b), own = update.factors(site), site.bias
        bias = f"{path}.bias" if own is None else own.partition(".")[2]
        made = {(path, what): v for what, v in {A: a, B: b, INNER: update.inner, OUTER: update.outer}.items()}
        found |= {place: value for place, value in {**made, (bias, OWN): update.bias}.items() if value is not None}
    return found


def _beside(adapted: AdaptedModel, updates: Mapping[str, Update], own: Mapping[str, Tensor]) -> Wanted:
    """Keys and values beside attentions, from what reads them through the projections as they are adapted."""
    found: Wanted = {}
    for name, placement in _placements(adapted):
        method, heads = placement.method, placement.site.heads
        if not isinstance(method, AttentionMethod):
            continue
        assert heads is not None
        p = {key: t.float() for key, t in adapted.adapter(name).params(placement).items()}
        made = []
        for path, rows in ((heads.key, heads.key_rows), (heads.value, heads.value_rows)):
            update = updates.get(path, Update())
            base = _base(adapted, adapted.sites.by_path(path), update, own)
            y = F.linear(method.reads(p), update.apply(base.weight.float()), base.bias)
            made.append(split_heads(y, rows, heads.kept))
        keys, values = method.beside(placement.site, made[0], made[1], p)
        if (placement.site.path, KEYS) in found:
            what = "two adapters stand beside one attention, and a graph has one place there"
            raise PeftfxError(what, placement.site.path, "make one of them active at a time")
        found |= {(placement.site.path, KEYS): keys, (placement.site.path, VALUES): values}
    return found


def _ahead(adapted: AdaptedModel, decodes: bool) -> Wanted:
    """A soft prompt, a row for each of its tokens: embeddings, or keys and values."""
    for name, placement in _placements(adapted):
        if not isinstance(placement.method, SequenceMethod):
            continue
        embedded = isinstance(adapted.entry(), VirtualTokens)
        if embedded and decodes:
            return {("", PREFIX): adapted.graph(view=DECODE).get(f"{DERIVED}.{NAME}")}
        rows = placement.method.virtual(adapted.adapter(name).params(placement), False)
        return {("", PROMPT if embedded else PREFIX): rows}
    return {}


def _laid(value: Tensor, slot: Slot) -> Tensor | None:
    """A tensor as the graph has it, if it fits."""
    laid = value.permute(slot.perm) if slot.perm and len(slot.perm) == value.ndim else value
    return laid.detach().to(getattr(torch, slot.dtype)).contiguous().cpu() if slot.takes(tuple(laid.shape)) else None


def _unchanged(adapted: AdaptedModel, name: str, value: Tensor) -> bool:
    """Whether a trained copy is still what the base has; trained rows have a name of their own."""
    tensor = getattr(*owner_of(adapted.base, name), None)
    own = None if tensor is None else exact(tensor)
    return own is not None and own.shape == value.shape and torch.equal(own.to(value), value)
