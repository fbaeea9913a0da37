"""HF PEFT's config objects as methods, with the target modules that HF PEFT chooses if the config names none."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peftfx.bases.embeddings import output_embeddings
from peftfx.bases.guests import own_modules
from peftfx.bases.tasks import PEFT_HEADS
from peftfx.contract.method import Method
from peftfx.rules.peft_conversion import as_converted
from peftfx.rules.peft_files import RECORDS, method_from_config
from peftfx.rules.tied_copies import without_idle_tying
from peftfx.sites.expression import ALL_LINEAR


def is_peft_config(rule: object) -> bool:
    """Return whether a rule is a config object like HF PEFT's."""
    return hasattr(rule, "peft_type") and hasattr(rule, "to_dict") and not isinstance(rule, type)


def method_from_object(config: Any, base: nn.Module) -> Method:
    """Return the method that a HF PEFT config object describes, for this base.

    If the config has no `target_modules`, they come from HF PEFT's tables by model type, in the installed `peft`. If
    these have no entry for the model, the method's own default holds. `all-linear` stands for every `nn.Linear` and
    `Conv1D` except the output embedding. A task's head is added to `modules_to_save`. Targets among stacked experts are
    converted as `get_peft_model` converts them.
    """
    of_peft = any(cls.__module__.startswith("peft.") for cls in type(config).__mro__)
    model_type = getattr(getattr(base, "config", None), "model_type", None) if of_peft else None
    if isinstance(model_type, str):
        config = as_converted(config, base)
    options: dict[str, object] = dict(config.to_dict())
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if isinstance(model_type, str):
        for option, table in _tables(kind).items():
            if option in options and options[option] is None:
                options[option] = table.get(model_type)
    asked = options.get("target_modules")
    if isinstance(asked, str) and asked.lower() == ALL_LINEAR:
        options["target_modules"] = _every_linear(base)
    if "modules_to_save" in options:
        given = options["modules_to_save"]
        saved = [given] if isinstance(given, str) else list(given or ())  # type: ignore[call-overload]
        options["modules_to_save"] = [*saved, *(head for head in _heads(base, options) if head not in saved)] or None
    return method_from_config(without_idle_tying(options, base), type(config).__name__)


def records_of(rules: Iterable[object]) -> dict[str, object]:
    """Return what the first HF PEFT config object among `rules` says of base and task, for the saved files."""
    found: Any = next((rule for rule in rules if is_peft_config(rule)), None)
    options: Mapping[str, object] = {} if found is None else found.to_dict()
    return {k: getattr(v, "value", v) for k, v in options.items() if k in RECORDS and v is not None}


def _tables(kind: str) -> dict[str, Mapping[str, object]]:
    """Return HF PEFT's tables for a method: for each option that may be left out, its default by model type."""
    tables = importlib.import_module("peft.utils.constants")  # `peft.utils` passes some of them on, not all
    name = f"TRANSFORMERS_MODELS_TO_{kind.replace('_', '')}"
    found = {
        "target_modules": f"{name}_TARGET_MODULES_MAPPING",
        "feedforward_modules": f"{name}_FEEDFORWARD_MODULES_MAPPING",
    }
    return {option: getattr(tables, table) for option, table in found.items() if hasattr(tables, table)}


def _every_linear(base: nn.Module) -> list[str]:
    """Return the paths of the modules that HF PEFT's `all-linear` stands for."""
    head = output_embeddings(base)
    return [path for path, module in own_modules(base) if path and _is_linear(module) and module is not head]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def _heads(base: nn.Module, options: Mapping[str, object]) -> list[str]:
    """Return the path endings of the heads that HF PEFT trains for the config's task, if the base has such heads."""
    kind = options.get("task_type")
    ends = PEFT_HEADS.get(str(getattr(kind, "value", kind)), ())
    return [end for end in ends if any(path.endswith(end) for path, _ in own_modules(base))]
