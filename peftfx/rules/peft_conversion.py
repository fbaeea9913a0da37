"""HF PEFT's reading of a new LoRA's targets on mixtures of experts that transformers stacks in its version 5.

There the experts' layers became stacks of weights, and the router a class of its own. So HF PEFT turns names of these
layers in `target_modules`, and "all-linear", into `target_parameters`. A stack that joins two layers has twice the rank
and alpha. The tables are those of the installed `peft`, and its own function reads them.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any

from torch import nn

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
