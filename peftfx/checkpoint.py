"""HF PEFT directories, both ways: an adapter is read for a base model, and written."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftfx.adapter import Adapter, whole
from peftfx.errors import PeftfxError, nearest
from peftfx.files import write_file, writing
from peftfx.method import Method
from peftfx.peft_files import CONFIG, RULES, STATE, WEIGHTS, Weights, method_from_config, read_config, rule_folders
from peftfx.placement import SAVED, Override, Placed, Placement, site_tensors
from peftfx.rules import overrides_of, placement_at, placements_of, refuse_crowding, saved_modules, within
from peftfx.sites import Sites
from peftfx.soft import SequenceMethod
from peftfx.soft_files import Contents, read_prompt, written_prompt

if TYPE_CHECKING:
    from peftfx.adapted import AdaptedModel


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
            what = f"another rule of this adapter has other values of {_override_name(override, set())}"
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
    placements = [p for p in possible if any(_name(p.site.path, s) in weights.names for s in p.suffixes().values())]
    saved = saved_modules(base, method)
    overrides = overrides_of(base, method, saved, [p.site for p in placements])
    overrides += _replaced_weights(placements, weights, base)
    adapter = Adapter([Placed(method, tuple(placements), tuple(overrides))], config)
    adapter.create(base, None)
    wanted = _wanted(placements, overrides)
    expected = {path for path in _targeted(base, method, sites) if not within(path, saved)}
    _refuse_mismatch(weights, {n: adapter.get(k) for n, k in wanted.items()}, expected, base, directory, marks)
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
        _name(p.site.path, suffix): f"{p.key}.{name}" for p in placements for name, suffix in p.suffixes().items()
    }
    adapted = {p.site.path for p in placements}
    return wanted | {_override_name(override, adapted): override.key for override in overrides}


def _name(path: str, suffix: str) -> str:
    return f"{path}.{suffix}".removeprefix(".")


def _override_name(override: Override, adapted: set[str]) -> str:
    """The name HF PEFT gives a trained tensor of the base: one of an adapted module is its `base_layer`'s."""
    name = override.key.removeprefix(f"{SAVED}.")
    path, _, leaf = name.rpartition(".")
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


def save_adapters(adapted: AdaptedModel, directory: Path, names: tuple[str, ...] | None) -> None:
    """Write adapters as HF PEFT does: the one named "default", or the only one, in `directory`, others below it."""
    chosen = adapted.names() if names is None else names
    if not chosen:
        raise PeftfxError(
            "there is no adapter to save", str(directory), "add one with add_adapter, or save before merge()"
        )
    contents = {name: _contents(adapted.base, adapted.adapter(name)) for name in chosen}
    for name, rules in contents.items():
        target = directory if name == "default" or len(chosen) == 1 else directory / name
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            _write(target, rules)


def _write(directory: Path, rules: dict[str, Contents]) -> None:
    """Write an adapter: one rule as HF PEFT does, of several each in a folder of its own."""
    if len(rules) == 1:
        _write_rule(directory, *rules.popitem()[1])
        (directory / RULES).unlink(missing_ok=True)  # another adapter's, that was here before
        return
    for name, contents in rules.items():
        (directory / name).mkdir(exist_ok=True)
        _write_rule(directory / name, *contents)
    write_file(directory / RULES, functools.partial(_save_json, {"rules": list(rules)}))
    for file in (CONFIG, WEIGHTS, STATE):
        (directory / file).unlink(missing_ok=True)


def _write_rule(directory: Path, config: dict[str, object], files: dict[str, dict[str, Tensor]]) -> None:
    for file, tensors in files.items():
        write_file(directory / file, functools.partial(_save_tensors, tensors))
    if STATE not in files:
        (directory / STATE).unlink(missing_ok=True)
    write_file(directory / CONFIG, functools.partial(_save_json, config))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _save_json(value: dict[str, object], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _contents(base: nn.Module, adapter: Adapter) -> dict[str, Contents]:
    """The config and tensors of each rule of an adapter, by the name of its folder."""
    named = [(f"{i}-{rule.method.peft_type.lower()}", rule) for i, rule in enumerate(adapter.placed, 1)]
    owners: dict[str, str] = {}
    for name, rule in named:
        for path in dict.fromkeys(p.site.path for p in rule.placements):  # in order: the first is named
            if owners.setdefault(path, name) != name:
                what = "two rules act on parts of this module, and HF PEFT's files know no parts"
                raise PeftfxError(what, path, "make an adapter of each rule (add_adapter), or export it merged")
    return {name: _rule_contents(base, adapter, rule) for name, rule in named}


def _rule_contents(base: nn.Module, adapter: Adapter, rule: Placed) -> Contents:
    if isinstance(rule.method, SequenceMethod):
        return written_prompt(base, adapter, rule)
    tensors: dict[str, Tensor] = {}
    methods: dict[str, Method] = {}
    for path, group in _by_site(rule.placements).items():
        method, params = whole(base, adapter, group)
        placement = dataclasses.replace(group[0], method=method)
        tensors |= {_name(path, suffix): params[key] for key, suffix in placement.suffixes().items()}
        methods[path] = method
    tensors |= {_override_name(override, set(methods)): adapter.get(override.key) for override in rule.overrides}
    config = _config(base, adapter, rule, rule.method.gather(methods))
    prefix = rule.method.prefix
    return config, {WEIGHTS: {f"{prefix}{k}": v.detach().contiguous() for k, v in tensors.items()}}


def _by_site(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    groups: dict[str, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(placement.site.path, []).append(placement)
    return groups


def _config(base: nn.Module, adapter: Adapter, rule: Placed, method: Method) -> dict[str, object]:
    """HF PEFT's config of an adapter: its records are kept from the one it was loaded with, if any."""
    paths = sorted({p.site.path for p in rule.placements})
    method = method.naming(paths, [name for name, _ in base.named_modules()])
    options: dict[str, object] = {f: getattr(method, f) for f in method.options()}
    if any(p.site.transposed for p in rule.placements) and "fan_in_fan_out" in options:
        options["fan_in_fan_out"] = True
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or None
    records = {"task_type": None, "base_model_name_or_path": name, **adapter.records}
    options = {f: v for f, v in options.items() if v is not None}  # not each method of HF PEFT has each field
    return {**records, **options, "peft_type": method.peft_type, "inference_mode": True}
