"""Refusals of models that other code has wrapped or partitioned in a way that adapters cannot follow."""

from __future__ import annotations

from torch import Tensor, nn
from torch import distributed as dist

from peftfx.errors import PeftfxError
from peftfx.sharding.models import gathers_weights, is_zero3, sharded_modules
from peftfx.sharding.parts import is_part, is_zero3_part


def refuse_zero3(model: nn.Module, what: str, hint: str) -> None:
    """Refuse what cannot be done after ZeRO-3 has partitioned a model; `what` and `hint` go into the message.

    Raises:
        PeftfxError: ZeRO-3 has partitioned the model.
    """
    if is_zero3(model):
        raise PeftfxError(f"this model is partitioned by DeepSpeed's ZeRO-3: {what}", type(model).__name__, hint)


def refuse_trained_by_zero3(model: nn.Module) -> None:
    """Refuse a model that an engine of ZeRO-3 trains already: new parameters would be none of the engine's.

    Raises:
        PeftfxError: `deepspeed.initialize` has partitioned the model.
    """
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if is_zero3(model) and any(map(gathers_weights, hooks)):
        what = "this model is trained by an engine of DeepSpeed's ZeRO-3, which takes no new parameters"
        raise PeftfxError(what, type(model).__name__, "adapt it ahead of `deepspeed.initialize`")


def refuse_other_wrappings(model: nn.Module) -> None:
    """Refuse FSDP1 and tensor parallel layers, which are not supported.

    Raises:
        PeftfxError: the model is wrapped in FSDP1, or has tensor parallel layers.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    fsdp2 = bool(sharded_modules(model))
    found = next((what for p in model.parameters() if (what := _other_wrapping(p, fsdp2))), None)
    if found is None and is_fsdp1(model):
        found = "this model is wrapped in FSDP1 (FullyShardedDataParallel)"
    if found is not None:
        hint = "use FSDP2, torch.distributed.fsdp.fully_shard on the layers; see docs/training.md"
        raise PeftfxError(
            f"{found}: methods inside its modules would read parts of weights", type(model).__name__, hint
        )


def is_fsdp1(model: nn.Module) -> bool:
    """Return whether FSDP1 has made a model's parameters flat: the parameters are marked, or none are left."""
    first = next(model.parameters(), None)
    if first is None:
        return bool(getattr(model, "_is_fsdp_managed_module", False))
    return any(getattr(p, "_fsdp_flattened", False) for p in model.parameters())


def _other_wrapping(parameter: Tensor, fsdp2: bool) -> str | None:
    if is_part(parameter) and not is_zero3_part(parameter) and not (fsdp2 and _is_fsdp2s(parameter)):
        return "this model has tensor parallel layers"
    return None


def _is_fsdp2s(parameter: Tensor) -> bool:
    """Return whether a tensor is sharded along only one axis of processes, as `fully_shard` does."""
    parted = [placement for placement in parameter.placements if not placement.is_replicate()]  # type: ignore[attr-defined]
    return len(parted) == 1 and parted[0].is_shard()
