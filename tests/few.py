"""Which models of the zoo a default run tries in the tests that are not the first proof of a model.

`test_sites.py` and `test_export.py` have every model in every run. `pytest -m slow` has the others of the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark.structures import ParameterSet

#: One of each way to place tokens, to compute and share attention, to be no text, and to be written by hand.
FEW = frozenset({"gpt2", "bloom", "llama", "falcon", "gemma2", "t5", "bert", "deberta", "vit", "unet", "custom"})


def few(names: Iterable[str]) -> list[ParameterSet]:
    """Parameters: of these models, those that are not among the few are slow."""
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]
