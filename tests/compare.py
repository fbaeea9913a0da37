"""How far outputs are apart, where they show something."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def farthest(got: Tensors, want: Tensors, call: Tensors) -> float:
    """The largest difference in what both have, relative to the largest value, where there is no padding."""
    names = got.keys() & want.keys()
    assert names, (sorted(got), sorted(want))
    worst = 0.0
    for name in names:
        a, b = got[name].float(), want[name].float()
        assert a.shape == b.shape, (name, tuple(a.shape), tuple(b.shape))
        worst = max(worst, float((a - b)[visible(a, call)].abs().max()) / max(1e-6, float(b.abs().max())))
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
