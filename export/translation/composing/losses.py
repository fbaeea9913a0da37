"""Losses that torch's exporter translates for plain classes alone, written in operators that ONNX has."""

from __future__ import annotations

import torch
from torch import Tensor

_NONE, _MEAN = 0, 1  #: reductions; the third is the sum


def cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Return the cross entropy of classes, or of their probabilities, with smoothed labels."""
    axis = 1 if x.ndim > 1 else 0
    log = x.log_softmax(axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    weighted = log if weight is None else log * weight.view(shape)
    if target.is_floating_point():
        wanted = target * (1 - label_smoothing) + label_smoothing / x.shape[axis]
        loss = -(wanted * weighted).sum(axis)
        return loss.sum() / loss.numel() if reduction == _MEAN else loss if reduction == _NONE else loss.sum()
    counted = target != ignore_index
    chosen = torch.where(counted, target, torch.zeros_like(target)).unsqueeze(axis)
    loss = -(1 - label_smoothing) * weighted.gather(axis, chosen).squeeze(axis)
    loss = torch.where(counted, loss - label_smoothing / x.shape[axis] * weighted.sum(axis), torch.zeros_like(loss))
    if reduction != _MEAN:
        return loss if reduction == _NONE else loss.sum()
    total = counted.to(x.dtype)
    if weight is not None:
        total = total * weight[chosen.squeeze(axis)]
    return loss.sum() / total.sum()
