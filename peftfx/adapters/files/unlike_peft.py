"""Warnings where an adapter's outputs differ from HF PEFT's, or where its file was made for another base."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.names import name_of
from peftfx.adapters.files.parameters import is_bare, without_place
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.contract.override import SAVED
from peftfx.contract.placed import Placements
from peftfx.contract.placement import Placement
from peftfx.contract.weight import WeightMethod
from peftfx.errors import listed, warn
from peftfx.rules.peft_conversion import taken_for_experts
from peftfx.rules.peft_files import Weights
from peftfx.rules.trained_copies import is_inside, saved_modules
from peftfx.sharding.parts import is_part


def warn_unlike_peft(base: nn.Module, adapter: Adapter, where: str) -> None:
    """Warn of the modules where HF PEFT computes other outputs, with the reason."""
    placements = adapter.placements
    found = {"its layer for trained rows leaves out the bias there, until it is merged": _without_bias(base, adapter)}
    found["its copy is inside a copy of another module, and HF PEFT does not run it"] = _inner_copies(base, adapter)
    found["it changes the weight as it loads, and so the other layer that shares it"] = _moved_for_two(base, adapter)
    modules = dict(own_modules(base, remove_duplicate=False))
    for placement in placements.weights:
        module = modules.get(placement.site.path)
        if module is not None:
            why = placement.method.apart_from_peft(placement.site, module)
            found.setdefault(why, []).append(placement.site.path)
    for prompt in placements.prompts:
        if why := prompt.method.apart_from_peft(base, prompt.site):
            warn(f"{where}: HF PEFT gives other outputs under {type(prompt.method).__name__}: {why}")
    for why, paths in found.items():
        if why and paths:
            warn(f"{where}: HF PEFT gives other outputs at {listed(paths, 3)}: {why}")
    _tell_taken_for_experts(base, placements, where)
    lost = [p.site.path for p in placements.weights if without_place(base, p.method, p.site)]
    if lost:
        what = "HF PEFT has no layer there, and loads these files without what they have of it"
        warn(f"{where}: {listed(lost, 3)}: {what}")


def _without_bias(base: nn.Module, adapter: Adapter) -> list[str]:
    """Return the paths of the layers with a bias that read trained rows: a tied head, or one that is named."""
    trained: dict[int, str] = {}
    for override in (override for override in adapter.overrides if override.rows):
        holder, _, leaf = name_of(override.module, override.name).rpartition(".")
        trained[id(getattr(base.get_submodule(holder), leaf))] = override.module
    heads = ((path, module) for path, module in own_modules(base) if isinstance(module, nn.Linear) and trained)
    held = ((path, trained.get(id(m.weight))) for path, m in heads if m.bias is not None)
    return [path for path, within in held if within in ("", path)]


def _inner_copies(base: nn.Module, adapter: Adapter) -> list[str]:
    """Return the modules that `modules_to_save` names inside others that it names, and whose copies were trained."""
    found = []
    for method in (placed.method for placed in adapter.placed if placed.method.modules_to_save):
        saved, names = saved_modules(base, method), tuple(method.modules_to_save or ())
        inner = (p for p, _ in own_modules(base) if p.endswith(names) and p not in saved and is_inside(p, saved))
        found += [path for path in inner if _is_changed(base, adapter, path)]
    return found


def _moved_for_two(base: nn.Module, adapter: Adapter) -> list[str]:
    """Return the layers whose weight HF PEFT changes as it starts, and which share that weight with another layer."""
    moved = [p.site.path for p in adapter.placements.weights if p.method.moves_weight_in_peft(p.site)]
    if not moved:
        return []
    holders = Counter(id(p) for _, module in own_modules(base) for p in module._parameters.values() if p is not None)
    modules = dict(own_modules(base, remove_duplicate=False))
    weights = ((path, getattr(modules.get(path), "weight", None)) for path in moved)
    return [path for path, weight in weights if holders[id(weight)] > 1]


def _is_changed(base: nn.Module, adapter: Adapter, path: str) -> bool:
    """Return whether a module's copy has other values than the module, or may have: one of them has none here."""
    own = ((f"{path}.{name}", p) for name, p in base.get_submodule(path).named_parameters())
    copies = {override.key for override in adapter.overrides}
    kept = [(adapter.get(key), p) for name, p in own if (key := f"{SAVED}.{name}") in copies]
    return any(copy.is_meta or p.is_meta or is_part(p) or not torch.equal(copy, p.to(copy)) for copy, p in kept)


def _tell_taken_for_experts(base: nn.Module, placements: Placements, where: str) -> None:
    """Warn of layers that a file names as HF PEFT names the layers that transformers has stacked as experts."""
    own = [p for p in placements.weights if p.method.peft_type == "LORA" and not is_bare(base, p.method, p.site)]
    names = taken_for_experts(base, {p.site.path.rpartition(".")[2] for p in own})
    paths = [p.site.path for p in own if p.site.path.endswith(tuple(f".{name}" for name in names))] if names else []
    if paths:
        what = "HF PEFT cannot load this LoRA as it is: it takes the names for those of experts' stacked weights"
        warn(f"{where}: {listed(paths, 3)}: {what}. Merge it here, or leave these layers out")


#: Inputs that HF PEFT's class for question answering takes and does not give to the model.
_NOT_GIVEN = ("token_type_ids", "position_ids")


def warn_of_inputs(base: nn.Module, task_type: object, where: str) -> None:
    """Warn of inputs that HF PEFT's class for a task never gives to the model, so that an adapter has not seen them."""
    if task_type != "QUESTION_ANS":
        return
    taken = inspect.signature(base.forward).parameters
    lost = [name for name in _NOT_GIVEN if name in taken]
    if lost:
        what = f"for QUESTION_ANS, peft gives the model no {' and no '.join(lost)}, and this adapter was trained so"
        warn(f"{where}: {what}; to get its outputs, leave {'these' if len(lost) > 1 else 'it'} out here too")


def warn_of_bare_keys(weights: Weights, method: Method, placements: Sequence[Placement]) -> None:
    """Warn of keys without HF PEFT's prefix: it loads a file without their tensors, but for those that places share."""
    prefix, shared = method.prefix, set(method.shared_keys([p.site for p in placements]).values())
    bare = [key for name, key in weights.names.items() if prefix and name == key and key not in shared]
    if bare:
        why = "HF PEFT would not load these tensors, and here they act"
        warn(f"{weights.path}: keys do not begin with {prefix!r}: {listed(bare, 1)}. {why}")


@contextmanager
def telling_other_base(adapter: Adapter, where: str) -> Iterator[None]:
    """Warn, after the `with` block copied a file into an adapter, if the file was made for another base."""
    plain = WeightMethod.apart_from_base
    asked = [p for p in adapter.placements.weights if type(p.method).apart_from_base is not plain]
    made = {p: {name: t.detach().clone() for name, t in adapter.params(p).items()} for p in asked}
    yield
    for placement, own in made.items():
        if why := placement.method.apart_from_base(own, adapter.params(placement)):
            warn(f"{where}: {placement.site.path}: {why}")
            return
