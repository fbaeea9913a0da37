"""Saved buffers of a model that Accelerate distributes: Accelerate sends only parameters, and fails at a buffer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from peftfx.sharding.parts import is_part

_HELD = "_held_back"  #: the attribute of a model that keeps its saved buffers while its parameters are distributed


def hold_buffers(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take the saved buffers out of a `state` that is to be distributed; keep their values for `send_buffers`."""
    names = [name for name, _ in model.named_buffers(remove_duplicate=False) if name in state]
    held = {name: state.pop(name) for name in names}
    if _part_without_values(model) is None:
        model.__dict__[_HELD] = held


def send_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the loaded state with the buffers of the first process. All processes must call this function."""
    held: dict[str, Tensor] = model.__dict__.pop(_HELD, {})
    part = _part_without_values(model)
    if part is None:
        return state
    device, sent = part.device_mesh.device_type, dict(state)  # type: ignore[attr-defined]
    for name, tensor in held.items():
        value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).clone()
        dist.broadcast(value, src=0)
        sent[name] = value
    return sent


def _part_without_values(model: nn.Module) -> Tensor | None:
    """Return a sharded parameter without values, or None if there is none."""
    return next((p for p in model.parameters() if is_part(p) and p.is_meta), None)
