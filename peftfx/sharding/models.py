"""Models whose parameters are sharded: what they are, and running their modules without what gathers weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

from peftfx.sharding.parts import is_part, is_zero3_part

_DEEPSPEED = "deepspeed."


def is_zero3(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has partitioned a model's parameters."""
    return any(is_zero3_part(p) for p in model.parameters())


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that `fully_shard` was called on."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded: whether processes have parts of its parameters."""
    return bool(sharded_modules(model)) or any(is_part(p) for p in model.parameters())


def is_handed_out(model: nn.Module) -> bool:
    """Return whether Accelerate is about to distribute a model's tensors, by its `state_dict`, to the processes.

    Accelerate does so under FSDP2 with `cpu_ram_efficient_loading`: the first process has the values, all processes
    shard a model on the meta device, and then each part is filled. Accelerate announces this in the environment, as it
    does for transformers. The environment names no model. So for a model that is not sharded yet, the result is true
    only if Accelerate's own code is the caller.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    parts = [p for p in model.parameters() if is_part(p)]
    asked = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("true", "1")
    return any(p.is_meta for p in parts) if parts else asked and _is_called_by("accelerate.utils.fsdp_utils")


def _is_called_by(module: str) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Let modules run without what FSDP2 and ZeRO-3 put around them to gather weights, until the `with` block ends."""
    found = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            found.append((hooks, dict(hooks)))
            for key in [k for k, hook in hooks.items() if gathers_weights(hook)]:
                del hooks[key]
    try:
        with _own_linear():
            yield
    finally:
        for hooks, before in found:
            hooks.clear()
            hooks.update(before)


@contextmanager
def _own_linear() -> Iterator[None]:
    """Let `F.linear` be torch's own until the `with` block ends. DeepSpeed replaces it in the whole process, for good.

    In a capture its own function would be a product without a layer, and no site.
    """
    before = F.linear
    if str(getattr(before, "__module__", "")).startswith(_DEEPSPEED):
        F.linear = torch._C._nn.linear
    try:
        yield
    finally:
        F.linear = before


def gathers_weights(hook: object) -> bool:
    """Return whether a hook of a module is one of those with which FSDP2 or ZeRO-3 gathers the module's weights."""
    return getattr(hook, "__module__", "").startswith(("torch.distributed.fsdp", _DEEPSPEED))
