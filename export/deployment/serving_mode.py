"""Put a model into the form that it is exported in (eval, without gradients, of one precision), and back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftfx.bases.dtypes import HALF_DTYPES, is_half
from peftfx.graph.contexts import evaluating
from peftfx.model.adapted import AdaptedModel


@contextmanager
def in_eval(adapted: AdaptedModel) -> Iterator[None]:
    """Put the base and the adapted model into eval mode without gradients. The modes are restored afterwards."""
    training = adapted.training
    adapted.training = False
    try:
        with evaluating(adapted.base), torch.no_grad(), _widened(adapted):
            yield
    finally:
        adapted.training = training


@contextmanager
def _widened(adapted: AdaptedModel) -> Iterator[None]:
    """Hold adapters in half precision in float32 if nothing of the base is in half precision.

    TRL trains the adapters of a quantised base in bfloat16. The base is exported in float32, and then so are they: the
    same numbers, and no activation is rounded for them, as when the adapter is saved and loaded.
    """
    narrow = [] if is_half(adapted.base) else [p for p in adapted.adapters.parameters() if p.dtype in HALF_DTYPES]
    own = [p.data for p in narrow]
    for p in narrow:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, data in zip(narrow, own, strict=True):
            p.data = data
