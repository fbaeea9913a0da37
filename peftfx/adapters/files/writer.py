"""The writer of HF PEFT directories: adapters, each rule of an adapter in a directory of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from peftfx.adapters.adapter import UNKNOWN, Account, Adapter, shared_key
from peftfx.adapters.files.base.embeddings import embeddings_beside
from peftfx.adapters.files.model_card import write_card
from peftfx.adapters.files.names import (
    inner_layers,
    name_of,
    name_of_base,
    named_modules,
    override_name,
    own_memory,
    row_layers,
)
from peftfx.adapters.files.parameters import as_parameters, exchanged, is_exchanged, naming_parameters
from peftfx.adapters.files.prompts import Contents, written_prompt
from peftfx.adapters.files.torch_attention import by_wrapper, other_projections, path_in_file, times_in_use
from peftfx.adapters.files.unlike_peft import warn_unlike_peft
from peftfx.bases.guests import own_class, own_modules
from peftfx.contract.method import Method
from peftfx.contract.override import tied_paths
from peftfx.contract.placed import Placed
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError, warn
from peftfx.files import folder_of, write_file, writing
from peftfx.formats import RULES, with_version
from peftfx.options import AUTO
from peftfx.rules.peft_files import CONFIG, STATE, WEIGHTS
from peftfx.sites.site import WeightSite


def save_adapters(
    base: nn.Module,
    adapters: Mapping[str, Adapter],
    directory: Path,
    *,
    in_folders: bool = False,
    embeddings: str | bool = AUTO,
) -> None:
    """Write adapters as HF PEFT does: "default", or the only one, to `directory`, the others to folders in it.

    Args:
        in_folders: whether the only one is in a folder of its name, too, unless it is "default".
        embeddings: whether the files have the base's embeddings, too; see `embeddings_beside`.
    """
    if not adapters:
        raise PeftfxError(
            "there is no adapter to save", str(directory), "add one with add_adapter, or save before merge()"
        )
    contents = {name: _contents(base, adapter) for name, adapter in adapters.items()}
    own = contents.get("default", {})
    if len(own) > 1 and (both := own.keys() & adapters.keys()):
        hint = "save the adapters one by one, each to a directory of its own"
        raise PeftfxError("two adapters would be written to this one folder", min(both), hint)
    for name in contents:
        if adapters[name].start == UNKNOWN:
            what = "this adapter is made from others that fit the base in memory, whose weights their start moved"
            raise PeftfxError(what, name, "export it merged, or save the others")
    for name, rules in contents.items():
        target = directory if name == "default" or (len(adapters) == 1 and not in_folders) else directory / name
        warn_unlike_peft(base, adapters[name], str(target))
        for kind in dict.fromkeys(type(p.method).__name__ for p in adapters[name].placements.patterns):
            warn(f"{target}: peft cannot load {kind}: it acts at a pattern, which peftfx alone finds")
        _, files = next(iter(rules.values()))
        if beside := _embeddings(base, adapters[name], embeddings, str(target)):
            files[WEIGHTS] = dict(own_memory({**beside, **files[WEIGHTS]}))
        with writing(target), folder_of(target), _folder(target):
            _write(target, rules)
            write_card(target, base, adapters[name])


@contextlib.contextmanager
def _folder(directory: Path) -> Iterator[None]:
    """Make a directory. If the block fails, a new one is removed."""
    new = not directory.exists()
    directory.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def config_and_tensors(base: nn.Module, adapter: Adapter) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the config that HF PEFT has for an adapter, and its tensors by their names in the file.

    Raises:
        PeftfxError: the adapter has several rules, each with a config of its own.
    """
    contents = list(_contents(base, adapter).values())
    if len(contents) != 1:
        what = f"an adapter of {len(contents)} rules has a config for each"
        raise PeftfxError(
            what, "peft_config", "make an adapter of each rule (add_adapter), or save it: save_pretrained"
        )
    config, files = contents[0]
    return config, files[WEIGHTS]


def state_of(base: nn.Module, adapter: Adapter, embeddings: str | bool, where: str) -> dict[str, Tensor]:
    """Return an adapter's tensors, and the base's embeddings as `embeddings_beside` has them, by HF PEFT's names.

    Raises:
        PeftfxError: the adapter has several rules, or the embeddings are asked for and cannot be there.
    """
    _, tensors = config_and_tensors(base, adapter)
    return {**_embeddings(base, adapter, embeddings, where), **tensors}


def _embeddings(base: nn.Module, adapter: Adapter, asked: str | bool, where: str) -> dict[str, Tensor]:
    beside = embeddings_beside(base, adapter, asked, where)
    return {f"{adapter.rules[0].prefix}{name}": tensor for name, tensor in beside.items()}


def refuse_save_arguments(safe: bool, other_state: bool, embeddings: str | bool, initial: object, to_hub: bool) -> None:
    """Refuse arguments of HF PEFT's `save_pretrained` that ask for what peftfx does not write."""
    if not safe:
        hint = "leave safe_serialization out: HF PEFT reads safetensors"
        raise PeftfxError("peftfx does not write pickles", "safe_serialization=False", hint)
    if other_state:
        what = "save_pretrained saves the adapters' own tensors, and takes no other state"
        raise PeftfxError(what, "state_dict", "leave it out; or give the state to load_state_dict first, then save")
    if initial is not None:
        what = "the adapter is not converted when it is saved: its start has not changed the base"
        hint = "leave it out; convert_to_lora(name, 2 * r) adds a LoRA for the same base that needs no such start"
        raise PeftfxError(what, "path_initial_model_for_weight_conversion", hint)
    if to_hub:
        what = "save_pretrained writes a directory, and pushes to no repository (HF PEFT ignores this argument)"
        raise PeftfxError(what, "push_to_hub", "call model.push_to_hub(repo_id)")
    if embeddings not in (AUTO, True, False):
        raise PeftfxError(f"unknown value {embeddings!r}", "save_embedding_layers", "one of 'auto', True, False")


def _write(directory: Path, rules: dict[str, Contents]) -> None:
    """Write an adapter to a directory: one rule as HF PEFT does, several rules each to a folder of its own."""
    if len(rules) == 1:
        write_rule_directory(directory, *rules.popitem()[1])
        (directory / RULES).unlink(missing_ok=True)  # left by another adapter that was saved here before
        return
    for name, contents in rules.items():
        (directory / name).mkdir(exist_ok=True)
        write_rule_directory(directory / name, *contents)
    write_file(directory / RULES, functools.partial(_save_json, with_version(RULES, {"rules": list(rules)})))
    for file in (CONFIG, WEIGHTS, STATE):
        (directory / file).unlink(missing_ok=True)


def write_rule_directory(directory: Path, config: dict[str, object], files: dict[str, dict[str, Tensor]]) -> None:
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
    """Return the config and the tensors of each rule of an adapter, by the name of the rule's folder."""
    named = [(f"{i}-{rule.method.peft_type.lower()}", rule) for i, rule in enumerate(adapter.asked, 1)]
    owners: dict[str, str] = {}
    for name, rule in named:
        paths = (p.site.path for p in rule.placements.weights)
        for path in dict.fromkeys(paths):  # in order, so that the message names the first path
            if owners.setdefault(path, name) != name:
                what = "two rules act on parts of this module, and HF PEFT's files know no parts"
                raise PeftfxError(what, path, "make an adapter of each rule (add_adapter), or export it merged")
    return {name: _rule_contents(base, adapter, number) for number, (name, _) in enumerate(named)}


def _rule_contents(base: nn.Module, adapter: Adapter, number: int) -> Contents:
    rule = adapter.asked[number]
    if rule.placements.prompts:
        return written_prompt(base, adapter, rule)
    parameters = as_parameters(base, rule)
    named_by = naming_parameters(base, rule.method, parameters)
    tensors: dict[str, Tensor] = {}
    methods: dict[str, Method] = {}
    for path, group in _by_site(rule.placements).items():
        method, params = group[0].whole(base, {p: adapter.params(p) | adapter.all_of(p) for p in group})
        placement = dataclasses.replace(group[0], method=method)
        params = exchanged(placement.site, params) if is_exchanged(base, placement) else params
        named_path = path_in_file(base, named_by, path, placement.known_as)
        for key, suffix in placement.file_suffixes().items():
            times = times_in_use(base, method, path, suffix)
            value = params[key] if times == 1 else params[key] / times
            paths = tied_paths(base, named_path) if placement.known_as else [named_path]
            tensors |= {name_of(file_path, suffix): value for file_path in paths}
        methods[placement.known_as or path] = method
    tensors |= other_projections(base, methods, tensors.values())
    account = adapter.accounts.get(number)
    adapted = {*methods, *row_layers(rule.overrides), *inner_layers(account.taken if account else ())}
    for override in rule.overrides:
        tensors |= {override_name(o, adapted): adapter.get(override.key) for o in override.by_each_name()}
    for override in (override for override in rule.overrides if override.tied):
        names = (name_of(path, "weight") for path in tied_paths(base, override.name.rpartition(".")[0]))
        tensors |= {name: adapter.get(override.key) for name in names}
    methods = {parameters.get(path, path): method for path, method in by_wrapper(base, methods).items()}
    gathered = named_by.gather(methods | _idle_methods(base, rule.method, account))
    if gathered.unloadable:
        warn(f"HF PEFT cannot load these files of {type(gathered).__name__}: {gathered.unloadable}")
    config = _config(base, adapter, rule, gathered, sorted(methods))
    prefix = rule.method.prefix
    named = {f"{prefix}{name}": t for name, t in tensors.items()}
    named |= {f"{prefix}{name}": t for name, t in (account.unused if account else {}).items()}
    named |= {key: adapter.get(shared_key(number, name)) for name, key in rule.method.shared_keys(rule.sites).items()}
    return config, {WEIGHTS: dict(own_memory(named))}


def _idle_methods(base: nn.Module, method: Method, account: Account | None) -> dict[str, Method]:
    """Return the methods of modules that do not run, and whose tensors are saved again: patterns name them, too."""
    paths = named_modules(account.unused, base) if account else ()
    sites = (WeightSite(path, "linear", "linear", None, "", None, (), False, (), ()) for path in sorted(paths))
    return {site.path: method.at(site) for site in sites}


def _by_site(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    groups: dict[str, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(placement.site.path, []).append(placement)
    return groups


def _config(base: nn.Module, adapter: Adapter, rule: Placed, method: Method, paths: Sequence[str]) -> dict[str, object]:
    """Return HF PEFT's config of an adapter, with the records of the config that it was loaded from."""
    method = method.naming(paths, [name for name, _ in own_modules(base)])
    options: dict[str, object] = {f: getattr(method, f) for f in method.options()}
    stored_in_out = any(p.site.transposed and p.site.kind == "linear" for p in rule.placements)
    if stored_in_out and "fan_in_fan_out" in options and not as_parameters(base, rule):  # HF PEFT has not both
        options["fan_in_fan_out"] = True
    if adapter.start not in ("", UNKNOWN) and "init_lora_weights" in options:
        options["init_lora_weights"] = adapter.start
    records = {"task_type": None, "base_model_name_or_path": name_of_base(base), **adapter.records}
    if records["task_type"] is None:  # by this HF PEFT's `AutoPeftModel` finds the base's class
        made = own_class(base)
        classes = {"base_model_class": made.__name__, "parent_library": made.__module__}
        records["auto_mapping"] = records.get("auto_mapping") or classes
    options = {f: v for f, v in options.items() if v is not None}  # HF PEFT's methods do not all have all fields
    return {**records, **options, "peft_type": method.peft_type, "inference_mode": True}
