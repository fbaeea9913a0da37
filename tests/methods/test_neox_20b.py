"""GPT-NeoX-20B, by its published sizes and without its weights: every method finds its places and is inserted."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import pytest
import torch
from matrix.cells import METHODS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import peftfx
from peftfx.methods import method_named, methods
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare

pytestmark = pytest.mark.slow
#: EleutherAI/gpt-neox-20b's config.
SIZES = {
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "vocab_size": 50432,
    "rotary_pct": 0.25,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
}
WIDTH, LAYERS = 6144, 44
PARAMETERS: Mapping[str, int] = {
    "LoRA": LAYERS * 2 * 4 * (WIDTH + WIDTH),  # queries and values
    "IA3": LAYERS * (2 * WIDTH + 4 * WIDTH),
    "Prompt Tuning": 4 * WIDTH,
    "P-Tuning": 4 * WIDTH + (WIDTH * 24 + 24) + (24 * 24 + 24) + (24 * WIDTH + WIDTH),
    "Prefix Tuning": 4 * LAYERS * 2 * WIDTH,
}


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()
    assert sum(p.numel() for p in model.parameters()) == 20_554_567_680
    return bare(model)


@pytest.mark.parametrize("name", [n for n, (kind, _) in METHODS.items() if kind in methods()])
def test_a_method_is_inserted(name: str, adapted: AdaptedModel) -> None:
    kind, options = METHODS[name]
    adapted.add_adapter("cell", method_named(kind).from_options(options))
    try:
        tensors = list(adapted.adapters.parameters())
        assert all(isinstance(p, FakeTensor) for p in tensors)
        assert sum(p.numel() for p in tensors) == PARAMETERS.get(name, sum(p.numel() for p in tensors))
        graph = adapted.graph()
        assert any(n.op == "get_attr" and str(n.target).startswith("adapters.cell.") for n in graph.nodes())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        assert peak < 4 << 30, f"{peak:,} bytes, and the weights alone are 82 GB"
    finally:
        adapted.remove()


def test_its_sites_are_those_of_a_small_one(adapted: AdaptedModel) -> None:
    small = GPTNeoXForCausalLM(
        GPTNeoXConfig(**{**SIZES, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99})
    )
    roles = [(s.path, s.role) for s in peftfx.inspect(small.eval())]
    assert [(s.path, s.role) for s in adapted.sites] == roles
    assert torch.get_default_dtype() is torch.float32
