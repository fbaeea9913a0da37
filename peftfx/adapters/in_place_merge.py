"""merge_into: the in-memory evaluator of derived weights that writes them into the base module itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.recipes import Derived, Folding, Rounding, foldings
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Base, WeightMethod
from peftfx.contract.placement import Override, owner_of, site_tensors
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.places import twin
from peftfx.sharding import full, is_part, overwrite
from peftfx.sites.site import Site


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        sites: the module paths whose weights changed.
        bytes: of the weights and biases that were written, trained copies included.
        adapter_bytes: of what went into them, and is no longer needed.
        roundings: what each site's weight lost to the base's dtype: nothing where that is fp32.
        untied: the weights that another module shared until now, and that are their own now.
    """

    sites: tuple[str, ...]
    bytes: int
    adapter_bytes: int = 0
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    untied: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[str, Rounding]:
        """The site that rounding took most from, relative to its weight; nothing from none if all are exact."""
        return max(self.roundings.items(), key=lambda item: item[1].max_rel, default=("", Rounding()))

    def __str__(self) -> str:
        path, worst = self.worst
        lines = [
            f"merged {len(self.sites)} sites: {self.bytes:,} bytes written, {self.adapter_bytes:,} of adapters folded",
            f"rounding: at most {worst}, at {path}" if worst.max_abs else "rounding: none, the weights are fp32's",
        ]
        return "\n".join([*lines, *([f"untied: {', '.join(self.untied)}"] if self.untied else [])])


def refuse_unmergeable(adapters: Mapping[str, Adapter]) -> None:
    """What acts beside the weights has no place in them."""
    placements = [p for adapter in adapters.values() for p in adapter.placements]
    if any(isinstance(p.method, SequenceMethod) for p in placements):
        hint = "export it: there it becomes a constant of the graph; or make adapters of weights alone active"
        raise PeftfxError("a soft prompt has no place in the base's weights", ", ".join(adapters), hint)
    beside = next((p for p in placements if isinstance(p.method, AttentionMethod)), None)
    if beside is not None:
        what = f"what {type(beside.method).__name__} adds to an attention has no place in the base's weights"
        hint = "export it: there its keys and values become constants; or make adapters of weights alone active"
        raise PeftfxError(what, beside.site.path, hint)


@torch.no_grad()
def merge_into(base: nn.Module, merged: Graph, adapters: Sequence[Adapter]) -> MergeReport:
    """Write the derived weights of a merged graph, and the adapters' overrides, into the base's parameters.

    One site at a time; sites that share a tensor are computed together before any is written. A tensor that a module
    outside the merge uses too is untied: the merged site gets a parameter of its own.

    Raises:
        PeftfxError: a merged weight would not be finite; nothing is written.
    """

    def read(target: str) -> Tensor:
        return full(merged.get(target))

    folded = foldings(merged.derived.values())
    _refuse_left_over(folded, adapters)
    _refuse_new_biases(base, merged)
    for folding in folded.values():  # computed twice: a merge that fails halfway could not be undone
        _refuse_infinite(folding.site, folding.evaluate(read))
    trained = {override.module for adapter in adapters for override in adapter.overrides if override.module}
    _part(base, {f.site.path for f in folded.values()} | trained, _run(merged))
    sharing = _names_by_tensor(base)
    _refuse_untying(base, sharing, [f.site for f in folded.values()])
    everywhere = {name: names for names in sharing.values() for name in names}
    groups: dict[str, list[Folding]] = {}
    for folding in folded.values():
        groups.setdefault(folding.weight, []).append(folding)
    written, roundings, untied = 0, dict[str, Rounding](), list[str]()
    for group in groups.values():
        values = [folding.measure(read) for folding in group]
        shared = len(sharing.get(id(site_tensors(base, group[0].site)[0]), ())) > 1
        for folding, (value, rounding) in zip(group, values, strict=True):
            written += _write(base, folding.site, value, untie=shared)
            roundings[folding.site.path] = rounding
            untied += [own_names(base, folding.site)[0]] if shared else []
    changed: dict[str, object] = dict(folded)
    written_names = {name for f in folded.values() for name in own_names(base, f.site)}
    for adapter in adapters:
        for override in adapter.overrides:
            name = f"{override.module}.{override.name}" if override.module else override.name
            if not override.module:  # wherever the tensor is used: of two tied modules one may have a folding
                name = next((other for other in everywhere.get(name, ()) if other not in written_names), name)
            if name not in written_names:  # a trained bias at a merged site went into its folding
                written += _put(base, name, override, full(adapter.get(override.key)))
                changed.setdefault(name.rpartition(".")[0])
    folded_in = sum(t.numel() * t.element_size() for adapter in adapters for _, t in adapter.tensors())
    return MergeReport(tuple(changed), written, folded_in, roundings, tuple(untied))


def _refuse_left_over(folded: Mapping[str, Folding], adapters: Sequence[Adapter]) -> None:
    """The adapters are gone after a merge: what the merged graph does not run would go with them."""
    placements = (p for adapter in adapters for p in adapter.placements if isinstance(p.method, WeightMethod))
    left = sorted({p.site.path for p in placements} - folded.keys())
    if left:
        what = f"the call that the model was transformed with does not run {', '.join(left[:4])}: nothing is merged"
        raise PeftfxError(what, left[0], "pass inputs= of a call that runs them to transform() or load()")


def _put(base: nn.Module, name: str, override: Override, value: Tensor) -> int:
    """Write what an adapter trained in the base's place; returns the bytes."""
    if not override.rows:
        return _assign(base, name, value, untie=bool(override.module))
    holder, leaf = owner_of(base, name)
    whole = full(getattr(holder, leaf))
    indices = torch.tensor(override.rows, device=whole.device)
    if override.module:  # in this module alone, though others may share the tensor
        return _assign(base, name, whole.index_copy(0, indices, value), untie=True)
    whole[indices] = value
    _assign(base, name, whole, untie=False)
    return value.numel() * value.element_size()


def _refuse_new_biases(base: nn.Module, merged: Graph) -> None:
    """A module that was written without a bias does not read one: a fold that makes one would be lost."""
    for derived in merged.derived.values():
        if not isinstance(derived, Derived) or derived.output != "bias":
            continue
        module, leaf = owner_of(base, own_names(base, derived.folding.site)[1])
        if leaf not in module._parameters:
            hint = "leave it out of the rule, set lora_bias=False, or export: the graph can hold the bias"
            raise PeftfxError("this module has no place for the merged bias", derived.folding.site.path, hint)


def _refuse_untying(base: nn.Module, sharing: Mapping[int, Sequence[str]], sites: Iterable[Site]) -> None:
    """What FSDP2 has sharded stays: a parameter that is put in its place would be forgotten at the next call."""
    for site in sites:
        tensor = site_tensors(base, site)[0]
        if is_part(tensor) and len(sharing.get(id(tensor), ())) > 1:
            what = f"its weight is {', '.join(sharing[id(tensor)])} in one, of which each process has a part"
            raise PeftfxError(what, site.path, "export it merged, or save the adapter and merge in one process")


def _run(merged: Graph) -> list[str]:
    """The places in which the graph runs its sites' modules, those where no adapter acts too."""
    return [site.path for site in merged.sites] + [n for names in merged.sites.elsewhere.values() for n in names]


def _part(base: nn.Module, changed: Iterable[str], called: Sequence[str]) -> None:
    """Give each module that changes an object of its own, where it is called by another path too.

    Under the other path it stays what it is, or changes in another way.
    """
    names: dict[int, list[str]] = {}
    for path in (p for p in called if _has(base, p)):
        names.setdefault(id(base.get_submodule(path)), []).append(path)
    for path in sorted(p for p in changed if _has(base, p)):
        for other in names.get(id(base.get_submodule(path)), ()):
            if other != path:
                _part_from(base, path.split("."), other.split("."))


def _part_from(base: nn.Module, path: Sequence[str], other: Sequence[str]) -> None:
    """Copy the first module along a path that is along the other too, behind what the paths begin with."""
    shorter = min(len(path), len(other))
    apart = next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), shorter)
    others = {id(base.get_submodule(".".join(other[: i + 1]))) for i in range(apart, len(other))}
    node = base
    for i, name in enumerate(path):
        child = node.get_submodule(name)
        if i >= apart and id(child) in others:
            node._modules[name] = twin(child)
            return
        node = child


def _names_by_tensor(base: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _write(base: nn.Module, site: Site, value: Base, *, untie: bool) -> int:
    weight, bias = own_names(base, site)
    module = base.get_submodule(site.path) if site.kind == "conv" else None
    if module is not None and value.weight.shape != getattr(module, "weight").shape:  # noqa: B009
        module.groups = 1  # type: ignore[assignment]
    written = _assign(base, weight, value.weight, untie=untie)
    for owner in base.modules() if untie else ():
        if hasattr(config := getattr(owner, "config", None), "tie_word_embeddings"):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
    return written + (0 if value.bias is None else _assign(base, bias, value.bias, untie=False))


def _refuse_infinite(site: Site, value: Base) -> None:
    real = [t for t in value if t is not None and not isinstance(t, FakeTensor)]
    if not all(bool(t.isfinite().all()) for t in real):
        hint = "the adapter or the base has inf or NaN, or their sum is too large for the base's dtype: merge in fp32"
        raise PeftfxError(f"the merged weight is not finite in {value.weight.dtype}", site.path, hint)


def own_names(base: nn.Module, site: Site) -> tuple[str, str]:
    """The names of a site's weight and bias as its own module has them; a tied weight's graph name may be another's."""
    own = f"{site.path}.weight"
    holder, leaf = owner_of(base, own) if _has(base, site.path) else (None, "")
    weight = own if holder is not None and leaf in holder._parameters else site.weight.partition(".")[2]
    bias = f"{site.path}.bias" if site.bias is None else site.bias.partition(".")[2]
    return weight, bias


def _has(base: nn.Module, path: str) -> bool:
    try:
        base.get_submodule(path)
    except AttributeError:
        return False
    return True


def _assign(base: nn.Module, name: str, value: Tensor, *, untie: bool) -> int:
    module, leaf = owner_of(base, name)
    old = getattr(module, leaf, None)
    if isinstance(old, Tensor) and (not untie or is_part(old)) and old.shape == value.shape:
        if old is not value:
            overwrite(old, value)
    elif leaf in module._buffers:
        module._buffers[leaf] = value.detach().clone()
    else:
        grad = bool(isinstance(old, Tensor) and old.requires_grad)
        module.register_parameter(leaf, nn.Parameter(value.detach().clone(), requires_grad=grad))
    return value.numel() * value.element_size()
