"""Tensors of which each process has a part (FSDP2, DeepSpeed's ZeRO-3): what they are, gathering and writing them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


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


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor that may be sharded; the processes exchange no data."""
    if not is_part(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    tensor.copy_(distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None))
