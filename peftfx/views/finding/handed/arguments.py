"""Runs a forward up to where it hands embedded text on to its text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from peftfx.views.sounds.encoded import EMBEDDED, handed_to


class _HandedOn(Exception):
    """Ends a forward where it hands embedded text on to a part of the model."""


def handed_arguments(base: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the named arguments with which a forward first calls a part of the model that takes embedded text."""
    found = dict[str, Any]()

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get(EMBEDDED) is not None:
            found.update(kwargs)
            raise _HandedOn

    handles = [part.register_forward_pre_hook(called, with_kwargs=True) for part in handed_to(base)]
    try:
        base(**given)
    except _HandedOn:
        return found
    finally:
        for handle in handles:
            handle.remove()
    return None


def are_tokens(places: Tensor, ids: Tensor, token: int) -> bool:
    """Return whether places, [batch, sequence] or with an axis of the width, are those of a token in a text."""
    if isinstance(places, FakeTensor):
        return False
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        wanted = ids == token
        return places.shape[:2] == wanted.shape and bool((places.reshape(*wanted.shape, -1) == wanted[..., None]).all())
