"""Runs of a model's own code on fake tensors, to see what of an input it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftfx.graph.contexts import evaluating, fake_mode_to_run, quietly, unchanged
from peftfx.graph.lazy_weights import faked


@contextmanager
def on_fakes(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Give the mode in which a model's code runs without its weights. Afterwards the model is as before."""
    mode = fake_mode_to_run(model)
    with quietly(), unchanged(model), faked(model), evaluating(model), torch.no_grad(), mode:
        yield mode
