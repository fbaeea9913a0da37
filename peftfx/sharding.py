"""Sharded tensors, of which each process has a part (FSDP2, DeepSpeed's ZeRO-3): tests, gathering, and writing."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from peftfx.errors import PeftfxError

_T = TypeVar("_T")
PATIENCE = datetime.timedelta(seconds=60)  #: how long a process waits for the others to make the same call
_CALLS: dict[str, int] = {}
_DEEPSPEED = "deepspeed."
_SHARED = "peftfx_shared"  #: the attribute that marks tensors which `share_whole` has handled


def is_part(tensor: object) -> bool:
    """Return whether this process has only a part of a tensor: a DTensor, or a parameter of ZeRO-3."""
    if not dist.is_available():
        return False
    if is_zero3_part(tensor):
        return True
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor; a sharded one is gathered, without gradient: all processes call in the same order."""
    if not is_part(tensor):
        return tensor
    if not is_zero3_part(tensor):
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor."""
    return torch.Size(tensor.ds_shape) if is_zero3_part(tensor) else tensor.shape  # type: ignore[attr-defined]


def whole_with_gradient(tensor: Tensor) -> Tensor:
    """Return the whole tensor; of a sharded one, each process's part gets the gradient of that part.

    That gradient is not averaged: what is computed from the whole must be equal in all processes. They call in the
    same order. A parameter of ZeRO-3 is returned as it is.

    Args:
        tensor: a tensor, which may be a DTensor.
    """
    return tensor.full_tensor() if is_part(tensor) and not is_zero3_part(tensor) else tensor  # type: ignore[attr-defined]


def is_zero3_part(tensor: object) -> bool:
    """Return whether a tensor is a parameter of DeepSpeed's ZeRO-3, of which each process has a part."""
    return hasattr(tensor, "ds_id")


def is_under_zero(parameter: Tensor) -> bool:
    """Return whether DeepSpeed's ZeRO, of any stage, trains a parameter: it keeps the gradient and a copy itself."""
    return is_zero3_part(parameter) or hasattr(parameter, "_hp_mapping")


def is_zero3(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has partitioned a model's parameters."""
    return any(is_zero3_part(p) for p in model.parameters())


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor that may be sharded; the processes exchange no data."""
    if not is_part(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    tensor.copy_(distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None))


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


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward, so that writes go to the parts."""
    for module in sharded_modules(model):
        module.reshard()  # type: ignore[operator]


def settle(model: nn.Module) -> Tensor | None:
    """Make FSDP2 find the modules' parameters now, before adapters' copies replace some during the first call.

    Returns:
        A sharded tensor of the model, or None if the model is not sharded.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if _is_fsdp1(model):
        refuse_other_wrappings(model)
    sharded = sharded_modules(model)
    for module in sharded:
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    return next((p for p in model.parameters() if is_part(p)), None) if sharded else None


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Let modules run without what FSDP2 and ZeRO-3 put around them to gather weights, until the `with` block ends."""
    found = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            found.append((hooks, dict(hooks)))
            for key in [k for k, hook in hooks.items() if _gathers(hook)]:
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


def without_fsdp(own: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard` changed it."""
    if not dist.is_available():
        return own
    from torch.distributed.fsdp import FSDPModule

    return own.__mro__[2] if FSDPModule in own.__bases__ else own


def rank() -> int:
    """Return the number of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share_whole(tensors: Iterable[Tensor], like: Tensor) -> None:
    """Start unsharded tensors with the first process's values, and average their gradients, as DDP does.

    Args:
        tensors: the tensors that each process has whole; sharded ones are skipped.
        like: a sharded tensor of the same model; the processes are those that have its parts.
    """
    mesh = like.device_mesh  # type: ignore[attr-defined]

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for axis in range(mesh.ndim):
            dist.all_reduce(parameter.grad, group=mesh.get_group(axis))
        parameter.grad.div_(mesh.size())

    for tensor in tensors:
        if is_part(tensor) or hasattr(tensor, _SHARED):
            continue
        setattr(tensor, _SHARED, True)
        for axis in range(mesh.ndim):
            group = mesh.get_group(axis)
            dist.broadcast(tensor.detach(), src=dist.get_global_rank(group, 0), group=group)
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(average)


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
    if is_zero3(model) and any(map(_gathers, hooks)):
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
    if found is None and _is_fsdp1(model):
        found = "this model is wrapped in FSDP1 (FullyShardedDataParallel)"
    if found is not None:
        hint = "use FSDP2, torch.distributed.fsdp.fully_shard on the layers; see docs/training.md"
        raise PeftfxError(
            f"{found}: methods inside its modules would read parts of weights", type(model).__name__, hint
        )


def _is_fsdp1(model: nn.Module) -> bool:
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


def together(what: str) -> None:
    """Wait until every process calls this function for the same work, before the first gathering.

    Raises:
        PeftfxError: another process does not call this function in time; gathering would wait for it for ever.
    """
    call, size = _CALLS.get(what, 0), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    keys = [f"peftfx/{what}/{call}/{number}" for number in range(size)]
    store.set(keys[rank()], "here")
    try:
        store.wait(keys, PATIENCE)
    except RuntimeError:
        late = [number for number, key in enumerate(keys) if not store.check([key])]
        store.delete_key(keys[rank()])
        named = ", ".join(str(number) for number in late)
        said = f"{what}() gathers weights of which each process has a part, and rank {named} has not called it"
        raise PeftfxError(said, what, f"call it in every process, outside of `if rank == 0`: {_WRITES}") from None
    _CALLS[what] = call + 1


_WRITES = "rank 0 alone writes"


def on_first(work: Callable[[], _T]) -> _T:
    """Call `work` in the first process while the others wait; all return its result, or raise its error."""
    told: list[object] = [None, None]
    if rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[1], Exception):
        raise told[1]
    return told[0]  # type: ignore[return-value]


def _gathers(hook: object) -> bool:
    return getattr(hook, "__module__", "").startswith(("torch.distributed.fsdp", _DEEPSPEED))
