"""The function `merge_into`: computes merged weights and writes them into the base's own modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.base_writer import BaseWriter, Ledger
from peftfx.adapters.deferred import Deferred
from peftfx.adapters.merge_report import MergeReport
from peftfx.adapters.recipes import Derived, Folding, Rounding, foldings
from peftfx.analysis.running import refuse_other_readers
from peftfx.contract.method import Base
from peftfx.contract.override import Override
from peftfx.contract.placement import owner_of, site_tensors
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.lazy_weights import Stored
from peftfx.graph.places import has_module
from peftfx.graph.recipe import Get
from peftfx.sharding.parts import full, is_part
from peftfx.sites.site import Site
from peftfx.twins.twin import open_quantised


@torch.no_grad()
def merge_into(
    base: nn.Module,
    merged: Graph,
    adapters: Sequence[Adapter],
    ledger: Ledger | None = None,
    *,
    late: bool = False,
) -> MergeReport:
    """Write the merged weights of a graph, and the adapters' overrides, into the base's parameters.

    One site is computed at a time. Sites that share a tensor are all computed before any of them is written. A tensor
    that a module outside the merge uses too is untied: the merged site gets a parameter of its own. With a `ledger`
    nothing is overwritten, and the old tensors can be put back.

    With `late` nothing is computed now: the base, of which the graph has another copy, gets `Deferred` parameters. The
    report's roundings are complete when these have been computed. Weights that are not finite are then not refused:
    the caller must look for them.

    Raises:
        PeftfxError: a merged weight would not be finite; nothing is written.
    """

    def read(target: str) -> Tensor:
        return full(merged.get(target))

    folded = foldings(merged.derived.values())
    _refuse_left_over(folded, adapters)
    _refuse_new_biases(base, merged, written=late)
    for folding in () if late else folded.values():  # computed twice, because a failure halfway could not be undone
        _refuse_infinite(folding.site, folding.evaluate(read))
    opened = open_quantised(base, [f.site.path for f in folded.values() if has_module(base, f.site.path)])
    trained = {override.module for adapter in adapters for override in adapter.overrides if override.module}
    writer = BaseWriter(base, ledger)
    writer.part({f.site.path for f in folded.values()} | trained, _run(merged))
    sharing = _names_by_tensor(base)
    sites = [folding.site for folding in folded.values()]
    _refuse_untying(base, sharing, [d for d in merged.derived.values() if isinstance(d, Derived)], adapters)
    tied = {site.path for site in sites if len(sharing.get(id(site_tensors(base, site)[0]), ())) > 1}
    refuse_other_readers(merged, sites, tied)
    groups: dict[str, list[Folding]] = {}
    for folding in folded.values():
        groups.setdefault(folding.weight, []).append(folding)
    written, roundings, untied = 0, dict[str, Rounding](), list[str]()
    for group in groups.values():
        values = [(_later if late else _now)(folding, read, roundings) for folding in group]
        shared = len(sharing.get(id(site_tensors(base, group[0].site)[0]), ())) > 1
        for folding, value in zip(group, values, strict=True):
            also = sharing.get(id(site_tensors(base, folding.site)[1]), ())
            apart = len(also) > 1 and _has_own_bias(folding, value, read)
            written += _write(writer, folding.site, value, untie=shared, untie_bias=apart)
            untied += [own_names(base, folding.site)[0]] if shared else []
    done = {name for f in folded.values() for name in own_names(base, f.site)}
    copies = _write_overrides(writer, adapters, sharing, done, roundings)
    changed = dict.fromkeys((*folded, *(name.rpartition(".")[0] for name in copies)))
    folded_in = sum(t.numel() * t.element_size() for adapter in adapters for _, t in adapter.tensors())
    written += sum(copies.values())
    return MergeReport(tuple(changed), written, folded_in, roundings, tuple(untied), opened)


def _write_overrides(
    writer: BaseWriter,
    adapters: Sequence[Adapter],
    sharing: Mapping[int, list[str]],
    done: Collection[str],
    roundings: dict[str, Rounding],
) -> dict[str, int]:
    """Write the trained copies of adapters into the base. Return the bytes that were written, by the tensors' names.

    Args:
        writer: writes into the base.
        adapters: the adapters.
        sharing: the names of each tensor of the base, by its id.
        done: the names of tensors that foldings were written to. A trained bias at a merged site is in its folding.
        roundings: gets what each copy lost to the base's dtype.
    """
    everywhere = {name: names for names in sharing.values() for name in names}
    written: dict[str, int] = {}
    for adapter in adapters:
        for override in adapter.overrides:
            name = f"{override.module}.{override.name}" if override.module else override.name
            if not override.module:  # under any of the tensor's names: one of two tied modules may have a folding
                name = next((other for other in everywhere.get(name, ()) if other not in done), name)
            if name not in done:
                size = _put(writer, name, override, full(adapter.get(override.key)), roundings)
                written[name] = written.get(name, 0) + size
    return written


def _now(folding: Folding, read: Get, roundings: dict[str, Rounding]) -> Base:
    value, roundings[folding.site.path] = folding.measure(read)
    return value


def _later(folding: Folding, read: Get, roundings: dict[str, Rounding]) -> Base:
    """Return the deferred result of a folding; now only its shapes and dtypes are known."""
    memo: dict[str, Tensor] = {}

    def blank(target: str) -> Tensor:
        tensor = read(target)
        return memo.setdefault(target, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    like = folding.evaluate(blank)
    same = like.bias is None or like.bias is blank(str(folding.bias))
    likes = [like.weight] if same or like.bias is None else [like.weight, like.bias]

    def make() -> list[Tensor]:
        return [t for t in _now(folding, read, roundings)[: len(likes)] if t is not None]

    made = Deferred.of(make, likes)
    bias = None if folding.bias is None else read(folding.bias)
    return Base(made[0], bias if same else made[1])


def _refuse_left_over(folded: Mapping[str, Folding], adapters: Sequence[Adapter]) -> None:
    """Refuse to merge placements that the merged graph does not run, because a merge deletes the adapters."""
    wanted = {p.site.path for adapter in adapters for p in adapter.placements.weights}
    left = sorted(wanted - folded.keys())
    if left:
        what = f"the call that the model was transformed with does not run {', '.join(left[:4])}: nothing is merged"
        raise PeftfxError(what, left[0], "pass inputs= of a call that runs them to transform() or load()")


def _put(writer: BaseWriter, name: str, override: Override, value: Tensor, roundings: dict[str, Rounding]) -> int:
    """Write a tensor that an adapter trained in place of the base's; return its size in bytes.

    Rows are rounded to the base's dtype, and their rounding is added to `roundings`.
    """
    if not override.rows:
        others = [f"{override.module}.{other}" for other in override.others]
        return writer.assign(name, value, untie=bool(override.module), others=others)
    holder, leaf = owner_of(writer.base, name)
    whole = full(getattr(holder, leaf))
    indices, exact = torch.tensor(override.rows, device=whole.device), value
    value = exact.to(whole.dtype)
    roundings.setdefault(name.rpartition(".")[0], Rounding.of(value, exact))
    # an override under a module replaces the tensor only there, though other modules may share the tensor
    writer.assign(name, _with_rows(whole, indices, value), untie=bool(override.module))
    return value.numel() * value.element_size()


def _with_rows(whole: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor with some rows replaced; a `Stored` tensor is read only when the values are asked for."""
    if not isinstance(whole, Stored):
        return whole.index_copy(0, indices, rows)
    like = torch.empty(whole.shape, dtype=whole.dtype, device="meta")
    return Deferred.of(lambda: [whole.index_copy(0, indices, rows)], [like])[0]


def _refuse_new_biases(base: nn.Module, merged: Graph, *, written: bool) -> None:
    """Refuse a fold that makes a bias at a module without a bias parameter, because the module ignores it.

    A module that could have a bias is refused too if the model is `written`: its config says that there is none.
    """
    for derived in merged.derived.values():
        if not isinstance(derived, Derived) or derived.output != "bias":
            continue
        module, leaf = owner_of(base, own_names(base, derived.folding.site)[1])
        if leaf not in module._parameters or (written and module._parameters[leaf] is None):
            hint = "leave it out of the rule, set lora_bias=False, or export: the graph can hold the bias"
            raise PeftfxError(
                "the module has no bias, and the merged weight needs one", derived.folding.site.path, hint
            )


def _refuse_untying(
    base: nn.Module, sharing: Mapping[int, Sequence[str]], derived: Iterable[Derived], adapters: Iterable[Adapter]
) -> None:
    """Refuse to untie a tensor that FSDP2 has sharded, because FSDP2 forgets a new parameter at the next call.

    A trained copy is for one module. Written into a sharded tensor, it would act in all modules that share the tensor.
    """
    written: list[tuple[str, str, Tensor | None]] = []
    for new in derived:
        weight, bias = site_tensors(base, new.folding.site)
        written.append((new.folding.site.path, new.output, weight if new.output == "weight" else bias))
    for override in (o for adapter in adapters for o in adapter.overrides if o.module):
        holder, leaf = owner_of(base, f"{override.module}.{override.name}")
        written.append((override.module, override.name, getattr(holder, leaf)))
    for path, name, tensor in written:
        if tensor is not None and is_part(tensor) and len(sharing.get(id(tensor), ())) > 1:
            named = ", ".join(sharing[id(tensor)])
            what = f"its {name} is one tensor with {named}, and each process has only a part of it"
            raise PeftfxError(what, path, "export it merged, or save the adapter and merge in one process")


def _run(merged: Graph) -> list[str]:
    """Return the paths where the graph runs its sites' modules, including paths without an adapter."""
    return [site.path for site in merged.sites] + [n for names in merged.sites.elsewhere.values() for n in names]


def _names_by_tensor(base: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _has_own_bias(folding: Folding, value: Base, read: Get) -> bool:
    """Return whether methods changed the bias: it is neither the base's nor a trained copy, which all layers read."""
    return value.bias is not None and (folding.bias is None or value.bias is not read(str(folding.bias)))


def _write(writer: BaseWriter, site: Site, value: Base, *, untie: bool, untie_bias: bool) -> int:
    weight, bias = own_names(writer.base, site)
    module = writer.base.get_submodule(site.path) if site.kind == "conv" else None
    if module is not None and value.weight.shape != getattr(module, "weight").shape:  # noqa: B009
        writer.put(vars(module), "groups", 1)
    written = writer.assign(weight, value.weight, untie=untie)
    if untie or untie_bias:
        writer.untie_configs()
    return written + (0 if value.bias is None else writer.assign(bias, value.bias, untie=untie_bias))


def _refuse_infinite(site: Site, value: Base) -> None:
    real = [t for t in value if t is not None and not isinstance(t, FakeTensor)]
    if not all(bool(t.isfinite().all()) for t in real):
        hint = "the adapter or the base has inf or NaN, or their sum is too large for the base's dtype: merge in fp32"
        raise PeftfxError(f"the merged weight is not finite in {value.weight.dtype}", site.path, hint)


def own_names(base: nn.Module, site: Site) -> tuple[str, str]:
    """Return the names of a site's weight and bias in its own module; a graph may name a tied weight by another."""
    held = base.get_submodule(site.path)._parameters if has_module(base, site.path) else {}
    weight = f"{site.path}.weight" if "weight" in held else site.weight.partition(".")[2]
    bias = f"{site.path}.bias" if site.bias is None or held.get("bias") is not None else site.bias.partition(".")[2]
    return weight, bias
