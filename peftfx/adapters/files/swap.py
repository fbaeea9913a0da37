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
from peftfx.errors import PeftfxError
from peftfx.rules.peft_files import WEIGHTS
from peftfx.sites.sites import Sites

_STARTS = frozenset({*PLACING, "modules_to_save", "init_lora_weights", "init_ia3_weights", "init_weights"})
"""Options that say where an adapter acts and how it was initialised. Its outputs do not depend on them any more."""


def swap_state(base: nn.Module, sites: Sites, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a state, by HF PEFT's names, into an adapter.

    Raises:
        PeftfxError: the state is of an adapter with other placements, ranks or options.
    """
    config, _ = config_and_tensors(base, adapter)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        write_rule_directory(Path(folder), config, {WEIGHTS: tensors})
        swap_file(base, sites, adapter, Path(folder))


@torch.no_grad()
def swap_file(base: nn.Module, sites: Sites, adapter: Adapter, directory: Path) -> None:
    """Copy the tensors of a HF PEFT directory into an adapter.

    Raises:
        PeftfxError: the two adapters differ in more than the values of their tensors.
    """
    new = read_adapter(directory, base, sites)
    own, others = dict(adapter.tensors()), dict(new.tensors())
    names = own.keys() ^ others.keys()
    shapes = [n for n in own.keys() & others.keys() if own[n].shape != others[n].shape]
    rules = _computed(new) != _computed(adapter)
    if names or shapes or rules:
        where = min([*names, *shapes], default="its options")
        what = "this adapter cannot take the place of the loaded one: its places, ranks or options differ"
        raise PeftfxError(what, where, "load it beside the other one: load_adapter(path, another_name)")
    fill(adapter, new)


@torch.no_grad()
def fill(adapter: Adapter, other: Adapter) -> None:
    """Copy the tensors of another adapter with the same tensors into an adapter."""
    own = dict(adapter.tensors())
    for name, value in other.tensors():
        own[name].copy_(value)


def _computed(adapter: Adapter) -> dict[str, object]:
    """Return the options that an adapter's outputs depend on, by placement."""
    return {p.key: _options(p) for p in adapter.placements}


def _options(placement: Placement) -> dict[str, object]:
    method = placement.method
    return {name: getattr(method, name) for name in method.options() if name not in _STARTS}
