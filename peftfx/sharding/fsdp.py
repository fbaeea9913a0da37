"""FSDP2: what its modules are told before and after adapters act, and tensors that it does not shard."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch import distributed as dist

from peftfx.sharding.models import sharded_modules
from peftfx.sharding.parts import is_part
from peftfx.sharding.refusals import is_fsdp1, refuse_other_wrappings

_SHARED = "peftfx_shared"  #: the attribute that marks tensors which `share_whole` has handled


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
    if is_fsdp1(model):
        refuse_other_wrappings(model)
    sharded = sharded_modules(model)
    for module in sharded:
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    return next((p for p in model.parameters() if is_part(p)), None) if sharded else None


def without_fsdp(own: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard` changed it."""
    if not dist.is_available():
        return own
    from torch.distributed.fsdp import FSDPModule

    return own.__mro__[2] if FSDPModule in own.__bases__ else own


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
