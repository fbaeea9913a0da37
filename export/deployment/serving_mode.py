"""The mode that a model is exported in: eval, without gradients; afterwards the mode is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftfx.graph.contexts import evaluating
from peftfx.model.adapted import AdaptedModel


@contextmanager
def in_eval(adapted: AdaptedModel) -> Iterator[None]:
    """Without gradients, the base and the model's own flag in eval mode; afterwards the flag is as it was."""
    training = adapted.training
    adapted.training = False
    try:
        with evaluating(adapted.base), torch.no_grad():
            yield
    finally:
        adapted.training = training
