"""Put a model into the mode that it is exported in (eval, without gradients), and restore its mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftfx.graph.contexts import evaluating
from peftfx.model.adapted import AdaptedModel


@contextmanager
def in_eval(adapted: AdaptedModel) -> Iterator[None]:
    """Put the base and the adapted model into eval mode without gradients. The modes are restored afterwards."""
    training = adapted.training
    adapted.training = False
    try:
        with evaluating(adapted.base), torch.no_grad():
            yield
    finally:
        adapted.training = training
