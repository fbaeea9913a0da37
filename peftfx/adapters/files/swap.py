"""The exchange of an adapter's tensors in place, so that models that use them, compiled models too, need no change."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.reader import read_adapter
from peftfx.adapters.files.writer import config_and_tensors, write_rule_directory
from peftfx.contract.method import PLACING
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError, listed, shown
from peftfx.rules.peft_files import WEIGHTS
from peftfx.sites.sites import Sites

_STARTS = frozenset({*PLACING, "modules_to_save", "init_lora_weights", "init_ia3_weights", "init_weights"})
"""Options that say where an adapter acts and how it was initialised. Its outputs do not depend on them any more."""

_FOR_FILES = frozenset({"fan_in_fan_out", "total_step"})
"""Options that files must have and rules may lack: how the base stores its weights, how long a budget of ranks is."""

_SIZES = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern"})
"""Options that say how large a LoRA's factors are, and by what their product is multiplied."""


def swap_state(base: nn.Module, sites: Sites, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a state, by HF PEFT's names, into an adapter.

    Raises:
        PeftfxError: the state is of an adapter with other placements, ranks or options.
    """
    config, _ = config_and_tensors(base, adapter)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}  # tied ones are apart
        write_rule_directory(Path(folder), config, {WEIGHTS: tensors})
        if swap_file(base, sites, adapter, Path(folder)) is not adapter:
            what = "this state is not one of the adapter: its ranks differ, or places are left out"
            raise PeftfxError(what, "peft_model_state_dict", "put the adapter of a directory there: hotswap_adapter")


def read_into(adapter: Adapter, directory: Path, base: nn.Module, sites: Sites) -> None:
    """Copy the tensors of a HF PEFT directory into an adapter.

    Raises:
        PeftfxError: the two adapters differ in places, ranks, scales or other options.
    """
    if swap_file(base, sites, adapter, directory) is not adapter:
        what = "an adapter of this name is loaded already, and this file has other ranks, scales or places"
        hint = "load it under another name; or put it in the other one's place: peftfx.hotswap_adapter"
        raise PeftfxError(what, str(directory), hint)


@torch.no_grad()
def swap_file(base: nn.Module, sites: Sites, adapter: Adapter, directory: Path) -> Adapter:
    """Copy the tensors of a HF PEFT directory into an adapter, and return it.

    If only ranks and scales differ, or places are left out, the tensors cannot be copied, and the adapter of the
    directory is returned.

    Raises:
        PeftfxError: the two adapters differ in more.
    """
    new = read_adapter(directory, base, sites)
    own, others = dict(adapter.tensors()), dict(new.tensors())
    copies = {o.key for o in adapter.overrides} ^ {o.key for o in new.overrides}
    unlike = sorted(copies or others.keys() - own.keys())
    known, computed = _computed(adapter), _computed(new)
    unlike += [key for key, options in computed.items() if _plain(options) != _plain(known.get(key, {}))]
    if unlike:
        told = _differences(adapter, new)
        what = f"this adapter cannot take the place of the loaded one: its places or options differ{told}"
        raise PeftfxError(what, unlike[0], "load it beside the other one: load_adapter(path, another_name)")
    shapes = [t.shape for t in own.values()] != [others[n].shape for n in own if n in others]
    if shapes or computed != known:
        back = _taken_back(adapter, new)
        if back is None:
            return new
        for key, value in back.items():
            _set(adapter, key, value)
    else:
        fill(adapter, new)
    _take_accounts(adapter, new)
    return adapter


def _taken_back(adapter: Adapter, new: Adapter) -> dict[str, Tensor] | None:
    """Return the values of an adapter's tensors, of which the file of another one holds what is left or joined.

    Return None if these are not the tensors of this adapter.
    """
    others = {p.key: (rule.method, p) for rule in new.placed for p in rule.placements}
    if others.keys() != {p.key for p in adapter.placements} or len(adapter.placements.weights) != len(others):
        return None
    back = {override.key: new.get(override.key) for override in adapter.overrides}
    for place in adapter.placements.weights:
        rule, other = others[place.key]
        found = place.method.taken_back(adapter.all_of(place), rule, new.all_of(other), place.site.path)
        if found is None:
            return None
        back |= {f"{place.key}.{name}": value for name, value in found.items()}
    same = all(back[o.key].shape == adapter.get(o.key).shape for o in adapter.overrides)
    return back if same else None


def _set(adapter: Adapter, key: str, value: Tensor) -> None:
    """Copy a value into an adapter's tensor; make a buffer of it if there is none."""
    if key in dict(adapter.tensors()):
        adapter.get(key).copy_(value)
    else:
        adapter.put(key, value, trained=False)


def _take_accounts(adapter: Adapter, new: Adapter) -> None:
    """Take over what the file has beside the tensors that act, so that it is saved again with them."""
    if _places(adapter) == _places(new):
        adapter.accounts, adapter.named = dict(new.accounts), new.named


def _places(adapter: Adapter) -> list[set[str]]:
    return [{p.key for p in rule.placements} for rule in adapter.placed]


@torch.no_grad()
def fill(adapter: Adapter, other: Adapter) -> None:
    """Copy the tensors of another adapter with the same tensors into an adapter."""
    own = dict(adapter.tensors())
    for name, value in other.tensors():
        own[name].copy_(value)


def _computed(adapter: Adapter) -> dict[str, dict[str, object]]:
    """Return the options that an adapter's outputs depend on, by placement; rates of dropout are those asked for."""
    return {p.key: _options(p) for rule in adapter.asked for p in rule.placements}


def _differences(adapter: Adapter, new: Adapter) -> str:
    """Return in words which places and tensors one of two adapters has alone, and which options are others."""
    known, computed = _computed(adapter), _computed(new)
    more = sorted(computed.keys() - known.keys())
    told = [f"it acts at {shown(more[0])}, and the loaded one does not"] if more else []
    other: dict[str, str] = {}
    for key, options in computed.items():
        for name, value in _plain(options).items():
            here = known.get(key, options).get(name)
            if here != value:
                other.setdefault(name, f"{name} is {shown(value)} in the file, and {shown(here)} here")
    told += other.values()
    told += _copies(new, adapter, "it has its own values of {}, and the loaded one has not")
    told += _copies(adapter, new, "the loaded one has its own values of {}, and this one has not")
    return f": {'; '.join(told)}" if told else ""


def _copies(adapter: Adapter, other: Adapter, what: str) -> list[str]:
    """Return in words which tensors of the base an adapter has values of its own for, and another one has not."""
    there = {override.key for override in other.overrides}
    names = {".".join(filter(None, (o.module, o.name))) for o in adapter.overrides if o.key not in there}
    return [what.format(listed(sorted(names)))] if names else []


def _plain(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options without those of ranks and scales."""
    return {name: value for name, value in options.items() if name not in _SIZES}


def _options(placement: Placement) -> dict[str, object]:
    method = placement.method
    return {name: getattr(method, name) for name in method.options() if name not in _STARTS | _FOR_FILES}
