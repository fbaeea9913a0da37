"""Which models of the zoo a default run tries in the tests that are not the first proof of a model.

`test_sites.py` has every model in every run, `test_peft_lora.py` all but those that are alike; `pytest -m slow` the
rest.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import pytest
from _pytest.mark.structures import ParameterSet

#: One of each way to place tokens, to share attention, to be no text, and to be written by hand.
FEW = frozenset({"gpt2", "bloom", "llama", "t5", "bert", "vit", "custom"})


#: So like others of the zoo, or exported so often by other files, that it need not be exported in every run.
ALIKE = frozenset(
    {
        *("roberta", "deberta_v2", "distilbert", "electra", "opt", "gpt_j", "gpt_neox", "qwen2", "qwen3", "phi"),
        *("gemma", "mistral", "dinov2", "swin", "gpt_neo", "phi3", "falcon", "bart", "albert", "clip"),
    }
)


def few(names: Iterable[str]) -> list[ParameterSet]:
    """Parameters: of these models, those that are not among the few are slow."""
    names = list(names)
    return but_for({*names} - FEW, names)


def but_further(further: Container[str], names: Iterable[str]) -> list[ParameterSet]:
    """Parameters: of these names, those in `further` are left to `pytest -m further`."""
    return [pytest.param(name, marks=pytest.mark.further if name in further else ()) for name in names]


def but_for(slow: Container[str], names: Iterable[str]) -> list[ParameterSet]:
    """Parameters: of these names, those in `slow` are left to `pytest -m slow`."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]
