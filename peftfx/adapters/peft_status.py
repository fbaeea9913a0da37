"""The reports on a model's adapters that HF PEFT has: `get_layer_status` and `get_model_status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.bases.guests import own_modules
from peftfx.contract.override import SAVED, tied_paths
from peftfx.errors import PeftfxError

Known = bool | Literal["irregular"]


@dataclass(frozen=True)
class LayerStatus:
    """The adapters in one module; the fields are HF PEFT's."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Known]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass(frozen=True)
class ModelStatus:
    """The adapters of a model; the fields are HF PEFT's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Known
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Known]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def layer_status(
    base: nn.Module, adapters: Mapping[str, Adapter], active: Iterable[str], merged: Sequence[str] = ()
) -> list[LayerStatus]:
    """Return the status of each module that an adapter acts in, in the base's order.

    Raises:
        PeftfxError: there are no adapters, or an adapter is a soft prompt, which acts in no module.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    kinds: dict[str, str] = {}
    for name, adapter in adapters.items():
        for path, kind, tensors in _places(base, adapter):
            found.setdefault(path, {}).setdefault(name, []).extend(tensors)
            kinds.setdefault(path, kind)
    if not found:
        raise PeftfxError("no adapter is in a module", "get_layer_status", "add one with add_adapter or load_adapter")
    order = {path: i for i, (path, _) in enumerate(own_modules(base))}
    acting = list(active)
    return [
        LayerStatus(
            name=f"model.{path}",
            module_type=kinds[path],
            enabled=bool(acting),
            active_adapters=acting,
            merged_adapters=[name for name in merged if name in here],
            requires_grad={name: _common(t.requires_grad for t in tensors) for name, tensors in here.items()},
            available_adapters=sorted(here),
            devices={name: sorted({t.device.type for t in tensors}) for name, tensors in here.items()},
        )
        for path, here in sorted(found.items(), key=lambda item: order[item[0]])
    ]


def model_status(
    base: nn.Module,
    adapters: Mapping[str, Adapter],
    active: Iterable[str],
    counts: tuple[int, int],
    merged: Sequence[str] = (),
) -> ModelStatus:
    """Return the status of all modules together; `counts` are the trainable and the total parameters."""
    layers = layer_status(base, adapters, active, merged)
    types = {name: adapter.rules[0].peft_type for name, adapter in adapters.items()}
    grads: dict[str, list[Known]] = {name: [] for name in adapters}
    devices: dict[str, set[str]] = {name: set() for name in adapters}
    for layer in layers:
        for name, known in layer.requires_grad.items():
            grads[name].append(known)
            devices[name].update(layer.devices[name])
    kinds = {rule.peft_type for adapter in adapters.values() for rule in adapter.rules}
    return ModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=" ".join(sorted(kinds)),
        peft_types=types,
        trainable_params=counts[0],
        total_params=counts[1],
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,
        active_adapters=layers[0].active_adapters,
        merged_adapters=list(merged),
        requires_grad={name: _common(known) for name, known in grads.items()},
        available_adapters=sorted(adapters),
        devices={name: sorted(kinds) for name, kinds in devices.items()},
    )


def _places(base: nn.Module, adapter: Adapter) -> Iterable[tuple[str, str, list[Tensor]]]:
    """Yield each placement's module path, HF PEFT's name for the kind of layer, and the adapter's parameters."""
    if adapter.placements.prompts:
        what = "a soft prompt acts before the modules: no module holds it"
        raise PeftfxError(what, "get_layer_status", "ask for peft_config, or named_parameters() of its adapter()")
    for placement in adapter.placements:
        path = placement.site.path
        kind = f"{placement.method.peft_type.lower()}.{type(base.get_submodule(path)).__name__}"
        yield path, kind, list(adapter.get_submodule(placement.key).parameters())
    for override in adapter.overrides:
        if override.tied:
            paths = tied_paths(base, override.name.rpartition(".")[0])
            yield from ((path, "ModulesToSaveWrapper", [adapter.get(override.key)]) for path in paths)
        elif override.module and override.key.startswith(f"{SAVED}."):
            yield override.module, "ModulesToSaveWrapper", [adapter.get(override.key)]


def _common(values: Iterable[Known]) -> Known:
    kinds = set(values)
    return "irregular" if len(kinds) > 1 else kinds.pop() if kinds else False
