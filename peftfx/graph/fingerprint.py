"""Fingerprint: a hash of a base model's weights, which tells whether a graph and an adapter belong to the same base."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError
from peftfx.graph.lazy_weights import exact

VERSION = 2  #: the version of the hash; version 1 reads only some values of each tensor
SAMPLED = 1  #: the version that reads only samples
_SAMPLES = 64  #: how many values of a tensor version 1 reads
_CHUNK = 1 << 22  #: how many values are in memory at a time


def fingerprint(base: nn.Module, version: int = VERSION) -> str:
    """Return a hash of a model's weights: of their names, shapes and values.

    Values are hashed in float32, so that a base has the same hash whether it is read in float32 or in the half
    precision of its files. Each weight is read once, some megabytes at a time, at about two gigabytes of float32 a
    second.

    Args:
        base: the model.
        version: the version of the hash. The older version is for exports of an older peftfx, and reads fewer values.

    Raises:
        PeftfxError: the version is unknown.
    """
    if version not in (SAMPLED, VERSION):
        what = f"the fingerprint of this base is of a later version, {version}"
        raise PeftfxError(what, "", "update peftfx, or export the base again")
    found, seen = hashlib.sha256(), dict[int, bytes]()
    for name, tensor in sorted(nn.Module.state_dict(base, keep_vars=True).items()):
        found.update(f"{name}{list(tensor.shape)}".encode())
        if version == SAMPLED:
            found.update(_sampled(exact(tensor).detach()))
            continue
        if id(tensor) not in seen:  # tied weights are one tensor under several names
            seen[id(tensor)] = _digest(exact(tensor).detach())
        found.update(seen[id(tensor)])
    return found.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    """Return a hash of all values of a tensor."""
    found = hashlib.sha256()
    flat = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)
    for chunk in flat.split(_CHUNK):
        values = (chunk.float() if chunk.is_floating_point() else chunk).cpu().contiguous()
        found.update(values.numpy().data)
    return found.digest()


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu()
    return (some.real if some.is_complex() else some).float().numpy().tobytes()
