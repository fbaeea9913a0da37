"""Threads that build the classes of served models at once."""

from __future__ import annotations

import threading

import torch

from peftfx.bases.transformers_config import without_initial_values


def test_models_made_later_have_initial_values() -> None:
    """transformers replaces torch's functions: two threads may not leave in another order than they entered."""
    own, inside, left = torch.nn.init.normal_, threading.Event(), threading.Event()

    def other() -> None:
        with without_initial_values():
            inside.set()
            assert left.wait(timeout=60)

    thread = threading.Thread(target=other)
    with without_initial_values():
        thread.start()
        inside.wait(timeout=0.5)
    left.set()
    thread.join()
    assert inside.is_set()
    assert torch.nn.init.normal_ is own
