"""Check that weights and adapters are finite. A NaN or an infinity is an error that names its tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir
import torch

from peftfx.errors import PeftfxError
from peftfx.export.metadata import SOURCE
from peftfx.graph.graph import ADAPTERS, BASE, CONSTANTS
from peftfx.model.adapted import AdaptedModel


def refuse_infinite_adapters(adapted: AdaptedModel, names: Sequence[str]) -> None:
    """Refuse adapters that hold NaN, or an infinity that is no value. Weights are checked when they are written."""
    for name in names:
        excluding = adapted.adapter(name).excluding
        for key, tensor in adapted.adapter(name).tensors():
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            if not bool((tensor.isfinite() | (tensor.isneginf() & (key in excluding))).all()):
                what = f"the adapter {name!r} holds NaN or an infinity"
                raise PeftfxError(what, key, "look at the training that made it, or at its file")


def may_be_infinite(adapted: AdaptedModel) -> frozenset[str]:
    """Return the sources of the tensors that may hold an infinity: the base's buffers, and what methods name."""
    buffers = (f"{BASE}.{name}" for name, _ in adapted.base.named_buffers(remove_duplicate=False))
    own = (f"{ADAPTERS}.{name}.{key}" for name in adapted.names() for key in adapted.adapter(name).excluding)
    return frozenset((*buffers, *own))


def refuse_infinite(value: ir.Value, tensor: torch.Tensor, infinite: Collection[str] | None) -> None:
    """Refuse a tensor with NaN, or with an infinity unless its source is in `infinite`."""
    source = value.meta.get(SOURCE)
    if infinite is None or not isinstance(source, str) or source.startswith(f"{CONSTANTS}."):
        return
    if not tensor.is_floating_point() or not tensor.numel() or tensor.dtype.itemsize < 2:
        return
    low, high = tensor.aminmax()  # both are NaN if a value is NaN
    if bool(low.isfinite() & high.isfinite()):
        return
    if bool(low.isnan()):
        raise PeftfxError("this tensor holds NaN", source, "look at the training that made it, or at its file")
    if source not in infinite:
        hint = "if it is merged, export in fp32 (--dtype fp32), or with the adapter apart (--no-merge)"
        raise PeftfxError("this tensor holds an infinity", source, hint)
