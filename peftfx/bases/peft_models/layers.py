"""What the layers of a HF PEFT model say beside its files: which adapters act in them, and by what scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from peftfx.errors import PeftfxError


def active_adapters(model: Any) -> list[str]:
    """Return the active adapters of a HF PEFT model; none if adapters are disabled.

    Raises:
        PeftfxError: an adapter acts in some of its layers alone.
    """
    found = model.active_adapters
    names: list[str] = list(found() if callable(found) else found)
    layers = list(_layers(model))
    off = [path for path, layer in layers if layer.disable_adapters]
    if off and len(off) < len(layers):
        what = f"adapters are disabled in {len(off)} of its {len(layers)} layers alone"
        raise PeftfxError(what, off[0], "call enable_adapter_layers() or disable_adapter_layers() of the PeftModel")
    for name in model.peft_config:
        own = {path: name in layer.active_adapters for path, layer in layers if _has(layer, name)}
        other = next((path for path, acts in own.items() if acts != (name in names)), None)
        if other is not None:
            acts = [path for path, active in own.items() if active]
            what = (
                f"adapter {name!r} acts in {len(acts)} of its {len(own)} layers, and the PeftModel's active are {names}"
            )
            raise PeftfxError(what, other, f"call set_adapter({names!r}) of the PeftModel")
    return [] if off else names


def scales(model: Any, adapter: str) -> dict[str, float]:
    """Return the factor by which each layer multiplies what an adapter adds, by the layer's path; where it has one."""
    found = {}
    for path, layer in _layers(model.get_base_model()):
        own = getattr(layer, "scaling", None)
        if isinstance(own, Mapping) and isinstance(scale := own.get(adapter), int | float):
            ranks = getattr(layer, "ranknum", {})  # AdaLoRA divides by it in each call
            if adapter in ranks:
                scale = scale / (float(ranks[adapter]) + 1e-5)
            named = path.replace(".base_layer", "")  # of several parameters of one module
            found[".".join(filter(None, (named, getattr(layer, "parameter_name", ""))))] = float(scale)
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if hasattr(module, "disable_adapters") and hasattr(module, "merged_adapters"):
            yield path, module


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, ()) for name in getattr(layer, "adapter_layer_names", ()))
