"""Wrong arguments, refused before a model is captured for them: a capture takes a minute, and these checks no time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from peftfx.errors import PeftfxError, nearest, shown
from peftfx.model.adapted import AdaptedModel
from peftfx.model.by_name import LoadOptions
from peftfx.rules.peft_files import CONFIG, Weights, read_adapter_config, refuse_other_config, rule_folders
from peftfx.rules.tied_copies import method_of_file


def refuse_no_base(model: object) -> None:
    """Refuse what is no base model, or wraps one in a class whose calls differ from the base's.

    Raises:
        PeftfxError: it is no module, has adapters of peftfx already, or is compiled, scripted, made under
            `torch.inference_mode`, or wrapped for several devices.
    """
    if not isinstance(model, nn.Module):
        raise PeftfxError(f"not a model: {shown(model)}", "model", "pass a torch module, as from_pretrained gives")
    name = type(model).__name__
    if isinstance(model, AdaptedModel):
        hint = "use its own add_adapter, load_adapter, export and sites; or pass its base, `model.base`"
        raise PeftfxError("this model has been adapted by peftfx already", name, hint)
    if isinstance(model, torch._dynamo.OptimizedModule):
        hint = "pass the model that was compiled, `model._orig_mod`, and compile the adapted model"
        raise PeftfxError("this model is compiled", name, hint)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        hint = "pass the model inside, `model.module`, and wrap the adapted model"
        raise PeftfxError("this model is wrapped for several devices", name, hint)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            hint = "pass the model with the module that was scripted"
            raise PeftfxError("torch.export cannot capture what torch.jit has scripted", path or name, hint)
    for path, parameter in model.named_parameters():
        if parameter.is_inference():
            hint = "make the model outside of the block; calls of peftfx may be inside"
            raise PeftfxError("this weight was made under torch.inference_mode(), and cannot be captured", path, hint)


def refuse_unknown_arguments(options: Mapping[str, object]) -> None:
    """Refuse arguments that `peftfx.load` does not have, and name the nearest that it has."""
    wrong = next((name for name in options if name not in LoadOptions.__annotations__), None)
    if wrong is not None:
        known = ("inputs", "road", "config", *LoadOptions.__annotations__)
        raise PeftfxError(f"load has no argument {wrong!r}", "load", nearest(wrong, known) or ", ".join(known))


def refuse_unreadable(directory: Path, config: object) -> None:
    """Refuse what is no adapter, or has another config than is given."""
    for folder in rule_folders(directory):
        method = method_of_file(read_adapter_config(folder), str(folder / CONFIG))
        Weights(folder, method.prefix)
    if config is not None:
        refuse_other_config(config, directory)
