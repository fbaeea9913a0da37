"""The dtypes of weights: those in files, and those that a model needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from peftfx.bases.guests import own_parameters
from peftfx.errors import PeftfxError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dtype_of(files: Sequence[Path]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor in the files, in which they can be mapped without a copy.

    Raises:
        PeftfxError: the files have no floating-point tensor.
    """
    kinds = kinds_of(files)
    found = next((_DTYPES[kind] for kind in kinds.values() if kind in _DTYPES), None)
    if found is None:
        what = f"all tensors are {', '.join(sorted(set(kinds.values())))}" if kinds else "there is no tensor"
        hint = f"use the unquantised model, with weights in one of {', '.join(_DTYPES)}"
        raise PeftfxError(f"the files have no floating-point weights: {what}", ", ".join(map(str, files[:3])), hint)
    return found


def kinds_of(files: Sequence[Path]) -> dict[str, str]:
    """Return the dtype of each tensor in the files, as safetensors names it."""
    from safetensors import safe_open

    kinds: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            kinds |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return kinds


def dtype_plan(model: nn.Module, wanted: torch.dtype) -> Callable[[str], torch.dtype]:
    """Return a function from a parameter's name to its dtype: `wanted`, or fp32 for some modules."""
    plan = model._get_dtype_plan(wanted)  # type: ignore[operator]
    return lambda name: next((plan[key] for key in plan if key in name.split(".")), wanted)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model takes pixels, samples and other numbers: that of its first such parameter."""
    return next((p.dtype for _, p in own_parameters(model) if p.is_floating_point()), torch.float32)


HALF_DTYPES = (torch.bfloat16, torch.float16)


def is_half(model: nn.Module) -> bool:
    """Return whether a model has parameters in half precision."""
    return coarsest(model) in HALF_DTYPES


def coarsest(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's floating-point parameters that rounds most: what its numbers are good for."""
    kinds = {p.dtype for _, p in own_parameters(model) if p.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)
