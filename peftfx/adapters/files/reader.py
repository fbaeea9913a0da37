"""HF PEFT directories, read: an adapter for a base model. What writes them is in `peftfx/adapters/files/writer.py`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter, shared_key
from peftfx.adapters.files.prompts import read_prompt
from peftfx.adapters.files.sizes import fit, without_memory
from peftfx.contract.method import Method
from peftfx.contract.placement import SAVED, Override, Placed, Placement, site_tensors
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError, nearest
from peftfx.rules.peft_files import CONFIG, Weights, method_from_config, read_config, rule_folders
from peftfx.rules.resolution import (
    is_inside,
    overrides_of,
    placement_at,
    placements_of,
    refuse_crowding,
    saved_modules,
    without_ties,
)
from peftfx.sites.sites import Sites


def read_adapter(directory: Path, base: nn.Module, sites: Sites) -> Adapter:
    """The adapter in a HF PEFT directory, or in the directories of its rules, for this base.

    Which sites it has is read from its keys.

    Raises:
        PeftfxError: a file is missing or damaged, or keys are missing, unexpected or of another shape: all are listed.
    """
    folders = rule_folders(directory)
    adapter, *others = (_read_rule(folder, base, sites) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        _refuse_conflict(adapter, other, folder)
        adapter.add(other)
    refuse_crowding(adapter.placed)
    return adapter


def _refuse_conflict(adapter: Adapter, other: Adapter, folder: Path) -> None:
    """Two rules may train one tensor of the base, if they hold the same values of it: an adapter has one."""
    kept = {override.key for override in adapter.overrides}
    for override in other.overrides:
        if override.key in kept and not torch.equal(adapter.get(override.key), other.get(override.key)):
            what = f"another rule of this adapter has other values of {override_name(override, set())}"
            raise PeftfxError(what, str(folder), "save the adapter again, or load the folders one by one")


def _read_rule(directory: Path, base: nn.Module, sites: Sites) -> Adapter:
    """The adapter that one rule made."""
    config = read_config(directory)
    method = method_from_config(config, str(directory / CONFIG))
    weights = Weights(directory, method.prefix)
    if isinstance(method, SequenceMethod):
        adapter, wanted = read_prompt(directory, weights, method, base, sites, config)
        _refuse_mismatch(weights, {n: adapter.get(k) for n, k in wanted.items()}, set(), base, directory)
        _copy(adapter, wanted, weights)
        return adapter
    possible = [placement_at(base, method, site) for site in sites if site.kind in method.kinds]
    marks = {suffix.partition(".")[0] for p in possible for suffix in p.suffixes().values()}
    placements = [p for p in possible if any(name_of(p.site.path, s) in weights.names for s in p.suffixes().values())]
    placements = without_ties(placements)
    saved = saved_modules(base, method)
    overrides = overrides_of(base, method, saved, [p.site for p in placements])
    overrides += _replaced_weights(placements, weights, base)
    expected = {path for path in _targeted(base, method, sites) if not is_inside(path, saved)}
    if not placements and not overrides:
        _refuse_mismatch(weights, {}, expected, base, directory, marks)
        what = f"the file holds no tensor of {type(method).__name__} for a module that this model runs"
        raise PeftfxError(what, str(weights.path), "load it on the model that it was trained on, or save it again")
    adapter = Adapter([Placed(method, tuple(placements), tuple(overrides))], config)
    with without_memory(not fit(placements, weights, base)):  # then it is refused below
        adapter.create(base, None)
    wanted = _wanted(placements, overrides) | _shared(adapter, method, weights)
    _refuse_mismatch(weights, {n: adapter.get(k) for n, k in wanted.items()}, expected, base, directory, marks)
    _refuse_unknown_share(adapter, method, weights.names.keys() - wanted.keys(), directory)
    _copy(adapter, wanted, weights)
    return adapter


@torch.no_grad()
def _copy(adapter: Adapter, wanted: Mapping[str, str], weights: Weights) -> None:
    for name, key in wanted.items():
        adapter.get(key).copy_(weights[name])


def _replaced_weights(placements: list[Placement], weights: Weights, base: nn.Module) -> list[Override]:
    """HF PEFT saves the whole weight of an adapted embedding: it counts where it is not the base's own."""
    found = []
    for site in (p.site for p in placements if p.site.weight):
        name, tensor = f"{site.path}.base_layer.weight", site_tensors(base, site)[0]
        if name in weights.names and not (
            weights.shapes[name] == tuple(tensor.shape) and torch.equal(weights[name], tensor)
        ):
            found.append(Override(f"{SAVED}.{site.path}.weight", "", site.weight.partition(".")[2]))
    return found


def _wanted(placements: list[Placement], overrides: list[Override]) -> dict[str, str]:
    """For each name the file must have, where the adapter keeps its value."""
    wanted = {
        name_of(p.site.path, suffix): f"{p.key}.{name}" for p in placements for name, suffix in p.suffixes().items()
    }
    adapted = {p.site.path for p in placements}
    return wanted | {override_name(override, adapted): override.key for override in overrides}


def _shared(adapter: Adapter, method: Method, weights: Weights) -> dict[str, str]:
    """The same for what the rule's places share, with room for what is in the file.

    HF PEFT's may be larger: it is for all modules that were targeted, whether or not they run.
    """
    own = adapter.shared(0)
    wanted = {key: shared_key(0, name) for name, key in method.shared_keys().items() if name in own}
    for key, kept in wanted.items():
        shape, value = weights.shapes.get(key, ()), adapter.get(kept)
        if len(shape) == value.ndim and all(a >= b for a, b in zip(shape, value.shape, strict=True)):
            adapter.put(kept, value.new_empty(shape), trained=False)
    return wanted


def _refuse_unknown_share(adapter: Adapter, method: Method, inert: Collection[str], where: Path) -> None:
    """What places share depends on all of them: if some do not run here, it cannot be made again."""
    unsaved = adapter.shared(0).keys() - method.shared_keys().keys()
    if unsaved and inert:
        what = f"{', '.join(sorted(unsaved))} are not in the file, and depend on modules that this model never runs"
        raise PeftfxError(what, f"{where}: {min(inert)}", "save the adapter with them in the file")


def name_of(path: str, suffix: str) -> str:
    """A tensor's name in a file, without the prefix."""
    return f"{path}.{suffix}".removeprefix(".")


def override_name(override: Override, adapted: set[str]) -> str:
    """The name HF PEFT gives a trained tensor of the base: one of an adapted module is its `base_layer`'s."""
    name = override.key.removeprefix(f"{SAVED}.")
    path, _, leaf = name.rpartition(".")
    if override.rows:
        return f"{path}.token_adapter.{leaf}"
    return f"{path}.base_layer.{leaf}" if path in adapted else name


def _targeted(base: nn.Module, method: Method, sites: Sites) -> set[str]:
    """The sites that the config's own targets match; they may name none that this model runs."""
    try:
        return {p.site.path for p in placements_of(base, method, sites)} if method.target_modules else set()
    except PeftfxError:
        return set()


def _refuse_mismatch(
    weights: Weights,
    wanted: Mapping[str, Tensor],
    expected: set[str],
    base: nn.Module,
    where: Path,
    marks: Collection[str] = (),
) -> None:
    """Compare the file with what this base needs, and list all that does not fit at once.

    `marks` are how suffixes behind a module's path begin, for this method.
    """
    modules = {name for name, _ in base.named_modules()}
    have = {n for n in weights.names if n in wanted or not _inert(n, modules, marks)}
    absent = [f"every key of {path}" for path in sorted(expected) if not any(n.startswith(f"{path}.") for n in have)]
    missing, unexpected = sorted(wanted.keys() - have) + absent, sorted(have - wanted.keys())
    misshapen = [
        f"{n}: {list(weights.shapes[n])} in the file, {list(t.shape)} in this model"
        for n, t in wanted.items()
        if n in have and weights.shapes[n] != tuple(t.shape)
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if not any(lists.values()):
        return
    lines = [f"{len(items)} {what}: " + _listed(items) for what, items in lists.items() if items]
    near = nearest(_module_of(unexpected[0], marks), modules) if unexpected else ""
    hint = near or "load it on the model that it was trained on (the same size, the same number of labels)"
    raise PeftfxError("this adapter does not fit the model:\n  " + "\n  ".join(lines), str(where), hint)


def _listed(items: list[str], most: int = 12) -> str:
    more = f"\n    ... and {len(items) - most} more" if len(items) > most else ""
    return "".join(f"\n    {item}" for item in items[:most]) + more


def _module_of(name: str, marks: Iterable[str]) -> str:
    """The module path in a name of a checkpoint."""
    return re.split(rf"\.(?:{'|'.join(map(re.escape, ('base_layer', *marks)))})(?:\.|$)", name)[0]


def _inert(name: str, modules: set[str], marks: Iterable[str]) -> bool:
    """Whether a key is of a module that this model has and never runs (T5's `shared`), or a copy of a base weight.

    With `bias="all"` PEFT writes the bias of a module to save three times.
    """
    if ".modules_to_save." in name or ".original_module." in name:
        return True
    return name.endswith(".base_layer.weight") or ((path := _module_of(name, marks)) != name and path in modules)
