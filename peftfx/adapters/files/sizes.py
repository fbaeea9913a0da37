"""Sizes: what a config asks for is compared with the header of its file before memory is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from peftfx.contract.placement import Placed, Placement, shared_by
from peftfx.rules.peft_files import Weights


def without_memory(needed: bool = True) -> contextlib.AbstractContextManager[object]:
    """Inside, tensors that are made have shapes and dtypes and no values, if that is needed."""
    return FakeTensorMode(allow_non_fake_inputs=True) if needed else contextlib.nullcontext()


def fit(rule: Placed, weights: Weights, base: nn.Module) -> bool:
    """Whether what a rule's method makes at its places has the shapes that it has in the file, where it is there."""
    try:
        with without_memory(), torch.no_grad():
            shared = shared_by(rule, base, None)
            return all(_fits(placement, placement.init(base, None, shared), weights) for placement in rule.placements)
    except DataDependentOutputException:  # a start that looks at the base's numbers
        return True


def _fits(placement: Placement, made: Mapping[str, Tensor], weights: Weights) -> bool:
    names = {name: f"{placement.site.path}.{suffix}" for name, suffix in placement.suffixes().items()}
    return all(weights.shapes.get(names[n], t.shape) == tuple(t.shape) for n, t in made.items() if n in names)
