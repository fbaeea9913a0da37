"""Take over a HF PEFT model: its base without PEFT's layers, and its adapters as PEFT saves them.

`peft` is not imported. Its models are recognised by their class, and used by their own methods.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from peftfx.errors import PeftfxError, first_line

_CONFIG = "adapter_config.json"
_STARTS = ("init_lora_weights", "init_weights")
"""Options of how an adapter was initialised. Some of them changed the base at that time. A model that is taken over has
been initialised already."""


#: The names of children of PEFT's layers that are the base's own modules.
_HOLDS = ("base_layer", "original_module", "model")


def is_peft_model(model: object) -> bool:
    """Say whether a model is a `peft.PeftModel` or `peft.PeftMixedModel`."""
    return any(cls.__name__ in ("PeftModel", "PeftMixedModel") and _is_pefts(cls) for cls in type(model).__mro__)


def plain_base(model: Any) -> nn.Module:
    """Return the base of a HF PEFT model: the same tensors, in copied modules without PEFT's layers.

    Raises:
        PeftfxError: adapters are merged into the base, or a layer of PEFT holds no known module of the base.
    """
    base: nn.Module = model.get_base_model()
    memo: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    inner: dict[int, nn.Module] = {}
    _find_layers(base, "", inner)
    for number, module in inner.items():
        while id(module) in inner:  # one PEFT layer may be around another
            module = inner[id(module)]
        memo[number] = copy.deepcopy(module, memo)
    return copy.deepcopy(base, memo)


def _find_layers(module: nn.Module, path: str, found: dict[int, nn.Module]) -> None:
    """Find PEFT's layers that replace modules of the base, by their ids, and the replaced modules."""
    if getattr(module, "merged_adapters", None):
        what = f"adapters are merged into the base's weights: {', '.join(module.merged_adapters)}"  # type: ignore[arg-type]
        raise PeftfxError(what, path, "call unmerge_adapter() of the PeftModel first")
    if _is_pefts(type(module)):
        found[id(module)] = _inside(module, path)
        _find_layers(found[id(module)], path, found)
        return
    for name, child in module.named_children():
        _find_layers(child, f"{path}.{name}".removeprefix("."), found)


def _inside(module: nn.Module, path: str) -> nn.Module:
    """Return the base's own module inside a PEFT layer."""
    held = next((module._modules[name] for name in _HOLDS if name in module._modules), None)
    if held is None:
        hint = "save the adapter with save_pretrained, and load its directory"
        raise PeftfxError(f"peftfx does not know this layer of PEFT: {type(module).__name__}", path, hint)
    return held


def save_peft_adapters(model: Any, directory: Path) -> dict[str, Path]:
    """Let a HF PEFT model write its adapters, and return the folder of each adapter.

    Raises:
        PeftfxError: PEFT cannot write an adapter.
    """
    folders: dict[str, Path] = {}
    for name, config in model.peft_config.items():
        own = directory / str(len(folders))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(str(own), selected_adapters=[name], save_embedding_layers=False)
        except Exception as error:
            what = f"peft cannot write this {config.peft_type} adapter: {first_line(error)}"
            raise PeftfxError(what, name, "call delete_adapter(NAME) of the PeftModel first") from error
        folders[name] = own if name == "default" else own / name
        _forget_start(folders[name] / _CONFIG)
    return folders


def _forget_start(file: Path) -> None:
    """Mark an adapter as initialised. PiSSA, for example, changed the base, whose weights are used unchanged."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {name: True for name in _STARTS if isinstance(config.get(name), str)}
    file.write_text(json.dumps(config), encoding="utf-8")


def active_adapters(model: Any) -> list[str]:
    """Return the active adapters of a HF PEFT model; none if adapters are disabled."""
    found = model.active_adapters
    names: list[str] = list(found() if callable(found) else found)
    layers = [m for m in model.modules() if hasattr(m, "disable_adapters") and hasattr(m, "merged_adapters")]
    return [] if layers and all(m.disable_adapters for m in layers) else names


def _is_pefts(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "peft"
