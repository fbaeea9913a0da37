"""A hash of what an adapted model computes: trainers keep a reference model's results in files, under such hashes."""

from __future__ import annotations

import hashlib
from types import FrameType

import torch
from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import settings_of
from peftfx.graph.fingerprint import fingerprint
from peftfx.model.hosted.hosted_base import HostedBase
from peftfx.quantisation.coded import Coded

_HASHER = "hash_module"  #: of TRL's `DPOTrainer` and `KTOTrainer`: it reads a model's `state_dict`


def is_hashed(frame: FrameType) -> bool:
    """Return whether a model's state is asked for to hash the model, and not to save the model.

    Args:
        frame: where the state is asked for.
    """
    return frame.f_code.co_name == _HASHER


def hash_of(model: HostedBase) -> Tensor:
    """Return a hash of the base's weights, of the adapters that act on it, and of their rules, as a tensor of bytes.

    Weights are read one at a time: nothing of the base's size is copied.

    Args:
        model: the adapted model.
    """
    adapters = [_told(adapter) for adapter in model.named.acting()]
    kinds = sorted({_kind(p) for p in model.source.parameters()})  # a fingerprint is the same for all of them
    found = hashlib.sha256(repr((fingerprint(model.source), kinds, adapters)).encode())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def _told(adapter: Adapter) -> tuple[object, ...]:
    places = [(placement.key, settings_of(placement.method)) for placement in adapter.placements]
    return fingerprint(adapter), [_kind(tensor) for _, tensor in adapter.tensors()], places


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.dtype), tensor.codes.format if isinstance(tensor, Coded) else ""
