"""The reader of HF PEFT directories: an adapter for a base. The writer is `peftfx/adapters/files/writer.py`."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.adapters.adapter import Account, Adapter, shared_key
from peftfx.adapters.converted import make_room, take_over
from peftfx.adapters.files.accounts import Idle, repeats
from peftfx.adapters.files.base.replaced import replaced_weights, take_one_name
from peftfx.adapters.files.base.vocabulary import other_tokens
from peftfx.adapters.files.mismatch import refuse_mismatch
from peftfx.adapters.files.names import inner_layers, module_of, name_of, named_modules, override_name
from peftfx.adapters.files.parameters import exchange_read
from peftfx.adapters.files.places import names_in_file, path_for_config, places_beside, places_in
from peftfx.adapters.files.prompts import read_prompt, split
from peftfx.adapters.files.sizes import fit, without_memory
from peftfx.adapters.files.torch_attention import path_in_file, times_in_use
from peftfx.adapters.files.unlike_peft import telling_other_base, warn_of_bare_keys, warn_of_inputs, warn_unlike_peft
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.contract.override import Override
from peftfx.contract.placed import Placed, Placements
from peftfx.contract.placement import Placement
from peftfx.contract.sequence import PROMPT, SequenceMethod
from peftfx.errors import PeftfxError, warn
from peftfx.rules.peft_files import CONFIG, Weights, method_from_config, modules_in, read_adapter_config, rule_folders
from peftfx.rules.resolution import acted_at, check_reads, refuse_crowding, wrapped_at
from peftfx.rules.tied_copies import TYING, with_tied_names
from peftfx.rules.token_rows import refuse_beside_rows
from peftfx.rules.torch_attention import wrapper_of
from peftfx.rules.trained_copies import is_inside, no_module_to_save, overrides_of, saved_modules
from peftfx.rules.unplaced import counted_sites, refuse_unasked, tell_elsewhere, why_no_place
from peftfx.sites.sites import Sites


def read_adapter(directory: Path, base: nn.Module, sites: Sites) -> Adapter:
    """Return the adapter in a HF PEFT directory, or in the directories of its rules, for this base.

    The keys of the file say which sites the adapter has. Every tensor of the file is taken, or a warning says that the
    tensor changes nothing; see `peftfx.adapters.files.accounts`.

    Raises:
        PeftfxError: a file is missing or damaged; or keys are missing, unexpected, of another shape, or of a module
            that cannot be adapted here. The message lists all of them.
    """
    _refuse_no_values(base)
    folders = rule_folders(directory)
    adapter, *others = (_read_rule(folder, base, sites) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        _refuse_conflict(adapter, other, folder)
        adapter.add(other)
    refuse_crowding(adapter.placed)
    refuse_beside_rows(base, adapter.placed)
    tell_elsewhere(sites, acted_at(adapter.placed), wrapped_at(adapter.placed))
    check_reads(sites, adapter.placed)
    warn_unlike_peft(base, adapter, str(directory))
    return adapter


def _refuse_no_values(base: nn.Module) -> None:
    """Refuse a base without values: an adapter's tensors are made on its devices, and would lose the file's values."""
    tensors = base.named_parameters()
    empty = next((n for n, p in tensors if p.is_meta or isinstance(p, FakeTensor)), None)
    if empty is not None:
        what = "the base has no values here (a fake tensor, or the meta device), and the adapter's would be lost"
        raise PeftfxError(what, empty, "load the base's weights first; transform() makes an adapter without values")


def _refuse_conflict(adapter: Adapter, other: Adapter, folder: Path) -> None:
    """Refuse two rules that train the same tensor of the base but have different values for it."""
    kept = {override.key for override in adapter.overrides}
    for override in other.overrides:
        if override.key in kept and not torch.equal(adapter.get(override.key), other.get(override.key)):
            what = f"another rule of this adapter has other values of {override_name(override, set())}"
            raise PeftfxError(what, str(folder), "save the adapter again, or load the folders one by one")


def _read_rule(directory: Path, base: nn.Module, sites: Sites) -> Adapter:
    """Return the adapter in the directory of one rule."""
    config = read_adapter_config(directory)
    asked, config = config, with_tied_names(config, base, modules_in(directory) if config.get(TYING) else ())
    if asked.get("target_modules") != config.get("target_modules"):
        warn(f"{directory}: {TYING}: trained on here, the LoRAs at the tied tensor change apart")
    method = method_from_config(config, str(directory / CONFIG))
    weights = Weights(directory, method.prefix)
    method, why = method.as_saved(weights.shapes)
    if why:
        warn(f"{directory}: {why}")
    if method.doubt:
        warn(f"{directory}: {method.doubt}")
    warn_of_inputs(base, config.get("task_type"), str(directory))
    return _read_as(method, weights, base, sites, config)


@functools.singledispatch
def _read_as(method: Method, weights: Weights, base: nn.Module, sites: Sites, config: Mapping[str, object]) -> Adapter:
    """Return the adapter of a method; its placements are the sites that the file has tensors for."""
    directory = weights.path.parent
    refuse_unasked(base, method)
    found = places_in(weights, method, base, sites)
    placements, left_out = found.placements, {path_for_config(p, base) for p in found.left_out}
    warn_of_bare_keys(weights, method, placements)  # not of prompts: HF PEFT writes these without a prefix
    exchange_read(base, weights, placements)
    saved = saved_modules(base, method)
    if idle_name := no_module_to_save(base, method, saved):  # HF PEFT passes over it, and its files may be whole
        warn(f"{directory}: {idle_name}")
    overrides = overrides_of(base, method, saved, [p.site for p in placements])
    names = set(weights.names)
    take_one_name(weights, overrides)
    own_names = {name for placement in placements for name in names_in_file(placement, base)}
    overrides += replaced_weights(base, weights, placements, overrides, own_names)
    beside = places_beside(method, placements, saved, base, sites) if method.has_shared else []
    counted = counted_sites([p.view for p in placements], beside, base)
    rule = Placed(method, Placements(placements), tuple(overrides), counted if placements else ())
    adapter = Adapter([rule], config)
    with without_memory(not fit(rule, weights, base)):  # a rule that does not fit is refused below
        adapter.create(base, None)
        make_room(adapter)
    within = set(inner_layers(weights.names)) - left_out
    wanted = _wanted(adapter, placements, overrides, base, within) | _shared(adapter, method, weights)
    again = repeats(weights, wanted, base, method)
    rest = weights.names.keys() - wanted.keys() - again
    idle = Idle.among(rest, weights, method, found.marks, base, sites, left_out)
    kept = idle.by_module.keys() | (rest & set(method.shared_keys(counted).values()))  # if it is placed nowhere
    _refuse_beside(adapter, method, beside, directory)
    targeted = {path for path in found.targeted if found.marks and not is_inside(path, saved)}
    refuse_mismatch(
        *(weights, {n: adapter.get(k) for n, k in wanted.items()}, kept | again, directory),
        expected={path for path in targeted if wrapper_of(base, method, path) is None},
        module_of=lambda name: module_of(name, found.marks),
        why=lambda path: why_no_place(path, base, sites, method.kinds),
        modules=[name for name, _ in own_modules(base)],
        other_tokens=lambda: other_tokens(base, weights),
    )
    if left_out and not placements:
        first = path_for_config(found.left_out[0], base)
        what = f"the config's target_modules leave out every module of the file, such as {first}"
        raise PeftfxError(what, str(directory / CONFIG), "correct target_modules: HF PEFT does not load it either")
    if not wanted and not idle.by_module:
        what = f"the file holds no tensor of {type(method).__name__} for a module that this model runs"
        raise PeftfxError(what, str(weights.path), "load it on the model that it was trained on, or save it again")
    with telling_other_base(adapter, str(directory)):
        _copy(adapter, wanted, weights)
    for placement in placements:
        _scale(adapter, placement, base)
    _leave_start(adapter, base, names)
    again |= names - weights.names.keys()
    instead = take_over(adapter)
    wanted = {name: instead.get(key, key) for name, key in wanted.items()}
    unused = {name: weights[name] for name in sorted(kept)}
    adapter.accounts[0] = Account(wanted, tuple(sorted(again)), unused, idle.of_this_call)
    adapter.named = named_modules(names - idle.outside, base)
    idle.tell(directory)
    return adapter


@_read_as.register
def _(method: SequenceMethod, weights: Weights, base: nn.Module, sites: Sites, config: Mapping[str, object]) -> Adapter:
    # A soft prompt has one placement, and its file has a form of its own.
    directory, names = weights.path.parent, set(weights.names)
    adapter, wanted = read_prompt(directory, weights, method, base, sites, config)
    modules = [name for name, _ in own_modules(base)]
    refuse_mismatch(weights, {n: adapter.get(k) for n, k in wanted.items()}, (), directory, modules=modules)
    _copy(adapter, wanted, weights)
    split(adapter)
    (placement,) = adapter.placements
    taken = wanted if PROMPT in wanted and not method.splits else {**wanted, PROMPT: placement.key}
    adapter.accounts[0] = Account(taken, tuple(sorted(names - taken.keys())), {})
    return adapter


@torch.no_grad()
def _copy(adapter: Adapter, wanted: Mapping[str, str], weights: Weights) -> None:
    names: dict[str, str] = {}
    for name, key in wanted.items():
        value, first = weights[name], names.setdefault(key, name)
        if first != name and not torch.equal(value, weights[first]):
            what = f"two keys of the file name one shared tensor, but hold different values; the other key is {first}"
            raise PeftfxError(what, f"{weights.path}: {name}", "save the adapter again")
        adapter.get(key).copy_(value)


@torch.no_grad()
def _scale(adapter: Adapter, placement: Placement, base: nn.Module) -> None:
    for name, suffix in placement.suffixes().items():
        times = times_in_use(base, placement.method, placement.site.path, suffix)
        if times != 1:
            adapter.get(f"{placement.key}.{name}").mul_(times)


@torch.no_grad()
def _leave_start(adapter: Adapter, base: nn.Module, names: Collection[str]) -> None:
    """Subtract no start from a weight that the file has: HF PEFT saves it without the part that the start took out."""
    for p in adapter.placements.weights:
        if name_of(path_in_file(base, p.method, p.site.path, p.known_as), "base_layer.weight") in names:
            for name, value in p.method.past_start(adapter.params(p)).items():
                adapter.get(f"{p.key}.{name}").copy_(value)


def _wanted(
    adapter: Adapter, placements: list[Placement], overrides: list[Override], base: nn.Module, within: set[str]
) -> dict[str, str]:
    """Return each name that the file must have, with the adapter's key; several names may have one shared tensor.

    HF PEFT has a layer around each module in `within`, also where the call gives the module no placement.
    """
    wanted: dict[str, str] = {}
    for placement in placements:
        kept = {f"{placement.key}.{name}": key for name, key in adapter.keys(placement).items()}
        wanted |= {name: kept.get(key, key) for name, key in names_in_file(placement, base).items()}
    adapted = {p.site.path for p in placements} | within
    return wanted | {override_name(override, adapted): override.key for override in overrides}


def _shared(adapter: Adapter, method: Method, weights: Weights) -> dict[str, str]:
    """Return the names and keys of the tensors that placements share, resized to their shapes in the file.

    HF PEFT's shared tensors may be larger: they are for all targeted modules, whether or not they run.
    """
    own, sized, wanted = adapter.shared(0), method.sized_by_layers(), {}
    for name, key in method.shared_keys(adapter.placed[0].sites).items():
        if name not in own:
            continue
        wanted[key] = kept = shared_key(0, name)
        shape, value = weights.shapes.get(key, ()), adapter.get(kept)
        longer = {i for i, (a, b) in enumerate(zip(shape, value.shape)) if a > b}
        shorter = any(a < b for a, b in zip(shape, value.shape))
        if len(shape) == value.ndim and longer and not shorter and longer <= set(sized.get(name, ())):
            adapter.put(kept, value.new_empty(shape), trained=isinstance(value, nn.Parameter))
    return wanted


def _refuse_beside(adapter: Adapter, method: Method, beside: Sequence[str], where: Path) -> None:
    """Refuse a file without the tensors that its places share, if they depend on modules that are no plain layers."""
    rule = adapter.placed[0]
    unsaved = adapter.shared(0).keys() - method.shared_keys(rule.sites).keys()
    if unsaved and beside and not rule.counted:
        what = f"{', '.join(sorted(unsaved))} are not in the file, and depend on modules that this call does not run"
        raise PeftfxError(what, f"{where}: {beside[0]}", "train the adapter without these modules (exclude_modules)")
