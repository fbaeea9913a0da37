"""Adapted models that several files look at, and leave as they were."""

from __future__ import annotations

import pytest
from support.zoo import ZOO

import peftfx
from peftfx.methods.lora import LoRA
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare


@pytest.fixture(scope="module")
def gpt2() -> AdaptedModel:
    """With a fresh adapter, which changes nothing: outputs are the base's own."""
    return peftfx.transform(ZOO["gpt2"].build(), LoRA())


@pytest.fixture(scope="module")
def bare_bert() -> AdaptedModel:
    """Captured once; a test that adds adapters takes them off again."""
    return bare(ZOO["bert"].build())
