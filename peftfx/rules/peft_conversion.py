"""HF PEFT's reading of a new LoRA's targets on mixtures of experts that transformers stacks in its version 5.

There the experts' layers became stacks of weights, and the router a class of its own. So HF PEFT turns names of these
layers in `target_modules`, and "all-linear", into `target_parameters`. A stack that joins two layers has twice the rank
and alpha. The tables are those of the installed `peft`, and its own function reads them.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from peftfx.bases.guests import own_modules, own_parameters
from peftfx.errors import PeftfxError
from peftfx.sites.expression import ends_with

_MODULE = "peft.utils.transformers_weight_conversion"


def as_converted(config: Any, base: nn.Module) -> Any:
    """Return a HF PEFT config object as `get_peft_model` changes it for this base. The given object is not changed.

    Raises:
        PeftfxError: HF PEFT cannot convert the config.
    """
    if importlib.util.find_spec(_MODULE) is None:  # an older peft takes a config as it is
        return config
    conversion = importlib.import_module(_MODULE)
    made = copy.deepcopy(config)
    try:
        known = conversion.get_model_conversion_mapping(base) if hasattr(base, "config") else None
        conversion.convert_peft_config_for_transformers(made, model=base, conversions=known)
    except ValueError as error:
        hint = "name all layers that the model holds in one weight, or none of them"
        raise PeftfxError(f"HF PEFT cannot convert the targets: {error}", "target_modules", hint) from error
    if made.to_dict() == config.to_dict() or not (made.target_modules or made.target_parameters):
        return config  # without any target, the defaults hold
    given = set(config.target_parameters or ())
    own = [name for name, _ in own_parameters(base, remove_duplicate=False)]
    made.target_parameters = sorted(
        name for name in made.target_parameters if name in given or any(ends_with(p, name) for p in own)
    )
    if isinstance(config.target_modules, str):  # the ends of what it matched: of modules, parameters and guests
        ends = {path.rpartition(".")[2] for path, _ in own_modules(base)}
        made.target_modules = made.target_modules & ends
    made.target_modules = sorted(made.target_modules)
    return made


def taken_for_experts(base: nn.Module, names: Collection[str]) -> list[str]:
    """Return those of a LoRA's names in `target_modules` by which the installed HF PEFT understands experts here.

    Without an installed `peft`, no name is told.
    """
    if not (names and _is_stacked(base) and importlib.util.find_spec("peft") and importlib.util.find_spec(_MODULE)):
        return []
    return [name for name in sorted(names) if not _is_kept(name, base)]


def _is_stacked(base: nn.Module) -> bool:
    """Return whether transformers joins several weights of this model's files into one as it reads them."""
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    known = get_checkpoint_conversion_mapping(model_type) if isinstance(model_type, str) else None
    return any(isinstance(item, WeightConverter) for item in known or ())


def _is_kept(name: str, base: nn.Module) -> bool:
    """Return whether HF PEFT leaves a name in `target_modules`."""
    made = importlib.import_module("peft").LoraConfig(target_modules=[name])
    try:
        importlib.import_module(_MODULE).convert_peft_config_for_transformers(made, model=base, conversions=None)
    except ValueError:  # it is a part of a stack, whose other part must be named too
        return False
    return name in made.target_modules
