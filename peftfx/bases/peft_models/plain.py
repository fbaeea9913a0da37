"""The base of a HF PEFT model without PEFT's layers.

`peft` is not imported. Its models are recognised by their class, and used by their own methods.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from peftfx.errors import PeftfxError

#: The names of children of PEFT's layers that are the base's own modules.
_HOLDS = ("base_layer", "original_module", "token_adapter", "model")


def is_peft_model(model: object) -> bool:
    """Say whether a model is a `peft.PeftModel` or `peft.PeftMixedModel`."""
    return any(cls.__name__ in ("PeftModel", "PeftMixedModel") and _is_pefts(cls) for cls in type(model).__mro__)


def carries_peft(model: nn.Module) -> bool:
    """Say whether a model that is no `peft.PeftModel` has layers of PEFT, as after diffusers' `add_adapter`."""
    return any(_is_pefts(type(module)) for module in model.modules())


def plain_base(model: Any) -> nn.Module:
    """Return the base of a HF PEFT model: the same tensors, in copied modules without PEFT's layers.

    What the PEFT model trains in the base itself (its biases) is a parameter of its own over the same memory: the base
    that is returned may be frozen, and the PEFT model trains on.

    Raises:
        PeftfxError: adapters are merged into the base, or a layer of PEFT holds no known module of the base.
    """
    base: nn.Module = model.get_base_model()
    memo: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers(), *_states(base))}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters() if p.requires_grad}
    inner: dict[int, nn.Module] = {}
    _find_layers(base, "", inner)
    for number, module in reversed(inner.items()):  # a layer inside another, such as an attention's, comes first
        while id(module) in inner:  # one PEFT layer may be around another
            module = inner[id(module)]
        memo[number] = copy.deepcopy(module, memo)
    return copy.deepcopy(base, memo)


def _states(base: nn.Module) -> Iterator[object]:
    """Find the objects that layers keep beside a weight of a class of its own: layers that share the weight share them.

    In its first call bitsandbytes' int8 layer moves the scales out of the weight into such an object. A second layer
    with an object of its own would find them no more.
    """
    for module in base.modules():
        if any(type(p) is not nn.Parameter and vars(p) for p in module._parameters.values() if p is not None):
            own = (value for name, value in vars(module).items() if not name.startswith("_"))
            yield from (v for v in own if hasattr(v, "__dict__") and not callable(v))


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
    held = next((own for name in _HOLDS if (own := module._modules.get(name)) is not None), None)
    if held is None:
        hint = "save the adapter with save_pretrained, and load its directory"
        raise PeftfxError(f"peftfx does not know this layer of PEFT: {type(module).__name__}", path, hint)
    return held


def _is_pefts(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "peft"
