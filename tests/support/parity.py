"""What an export is held against: the eager outputs of a model at unseen sizes, where there is no padding."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from support.zoo import Entry
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from peftfx.export import OnnxModel
from peftfx.graph.graph import leaf_names
from peftfx.model.adapted import AdaptedModel
from peftfx.views.view import without_cache

UNSEEN = ((3, 11), (1, 6))  # batch, sequence


def adaptable(module: nn.Module) -> bool:
    """Whether `peft` adapts a module: one of these types, or a linear layer of a model's own (Falcon's)."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D) or isinstance(module, nn.Linear)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model returns, by the names that its export has.

    An adapted model has no cache by itself; to it, a base of another config is one to capture anew.
    """
    with torch.no_grad(), contextlib.nullcontext() if isinstance(model, AdaptedModel) else without_cache(model):
        result = model(**inputs)
    if isinstance(result, Mapping):  # whoever has exported with transformers in this process has made caches pytrees
        result = {name: value for name, value in result.items() if not isinstance(value, Cache)}
    named = zip(leaf_names(result), pytree.tree_leaves(result), strict=True)
    return {name: value for name, value in named if isinstance(value, Tensor)}


def check(entry: Entry, want: nn.Module, got: OnnxModel, model: nn.Module, base: nn.Module) -> None:
    """Equal to 1e-4 of the largest value at two unseen shapes, where there is no padding; and not the base's."""
    for seed, (batch, sequence) in enumerate(UNSEEN):
        inputs = entry.inputs(batch, sequence, seed + 3, model=model)
        expected, plain = outputs(want, inputs), outputs(base, inputs)
        # A UNet's input and output are both called `sample`; in ONNX they cannot be.
        found = {name.removesuffix(".output"): value for name, value in got(**inputs).items()}
        changed = 0.0
        for name in found:
            a, b = expected[name], found[name]
            assert a.shape == b.shape
            mask = inputs.get("attention_mask")
            if mask is not None and a.shape[:2] == mask.shape:
                a, b = a[mask.bool()], b[mask.bool()]
            scale = max(1.0, float(a.abs().max()))
            assert float((a - b).abs().max()) <= 1e-4 * scale, name
            changed = max(changed, float((expected[name] - plain[name]).abs().max()) / scale)
        assert changed > 1e-3, "the adapter changes nothing: the test would pass without it"


Tensors = Mapping[str, Tensor]


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference of two tensors; infinite where there is a NaN, or an infinity on one side alone.

    A difference that is NaN would be lost: Python's `max(0.0, nan)` is 0.
    """
    far = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(far.max()) if far.numel() else 0.0


def farthest(got: Tensors, want: Tensors, call: Tensors) -> float:
    """The largest difference in what both have, relative to the largest value, where there is no padding."""
    names = got.keys() & want.keys()
    assert names, (sorted(got), sorted(want))
    worst = 0.0
    for name in names:
        a, b = got[name].float(), want[name].float()
        assert a.shape == b.shape, (name, tuple(a.shape), tuple(b.shape))
        shown, finite = visible(a, call), b[b.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        worst = max(worst, apart(a[shown], b[shown]) / max(1e-6, largest))
    return worst


def visible(value: Tensor, call: Tensors) -> Tensor:
    """Where an output shows something, as a mask of its first axes; virtual tokens are ahead of the text, and shown."""
    mask = call.get("attention_mask")
    if mask is None or value.ndim < 3 or value.shape[1] < mask.shape[1]:
        return torch.ones(value.shape[:1], dtype=torch.bool)
    return torch.cat([mask.new_ones(value.shape[0], value.shape[1] - mask.shape[1]), mask], dim=1).bool()


def changed(got: Tensors, base: Tensors) -> bool:
    """Whether an adapter does anything: a test that it passes without would prove nothing."""
    pairs = [(got[name], base[name]) for name in got.keys() & base.keys()]
    cut = [(a[:, -b.shape[1] :] if a.shape != b.shape else a, b) for a, b in pairs]  # behind the virtual tokens
    return any(float((a - b).abs().max()) > 1e-3 * float(b.abs().max()) for a, b in cut)
