"""One pattern over many architectures, held against what the models' own modules say; and on a graph of 32 layers."""

from __future__ import annotations

import time

import pytest
import torch
import transformers
from torch import nn

import peftfx
from peftfx.patterns.find import with_patterns
from peftfx.patterns.pattern import Pattern

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
}
#: Families of text models, and which activation their feed-forwards have.
FAMILIES = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo", "Olmo2", "Granite", "Cohere"), "silu"),
    **dict.fromkeys(("StableLm", "SmolLM3", "Glm", "Glm4", "Helium", "Exaone4", "SeedOss"), "silu"),
    **dict.fromkeys(("Gemma", "Gemma2", "Nemotron", "Phi", "GPTNeoX", "Arcee", "Starcoder2"), ""),
}


def gated(model: nn.Module) -> list[str]:
    """The modules that say themselves that they are a SwiGLU."""
    found = []
    for path, module in model.named_modules():
        names = {name for name, _ in module.named_children()}
        whole = {"gate_proj", "up_proj", "down_proj"} <= names or {"gate_up_proj", "down_proj"} <= names
        if whole and any(isinstance(m, nn.SiLU) or type(m).__name__ == "SiLUActivation" for m in module.children()):
            found.append(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_swiglus_are_found_where_modules_say_they_are(family: str, swiglu: Pattern) -> None:
    config = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SIZE)).eval()
    found = [match.module for match in swiglu.matches(peftfx.capture(model))]
    assert found == gated(model)
    assert len(found) == (SIZE["num_hidden_layers"] if FAMILIES[family] else 0)


@pytest.mark.slow
def test_a_graph_of_32_layers_is_searched_in_a_second(swiglu: Pattern) -> None:
    size = {**SIZE, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**size, "num_key_value_heads": 32})).eval()
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    graph = peftfx.capture(model, {"input_ids": ids})
    start = time.process_time()
    sites = with_patterns(graph, graph.sites)
    seconds = time.process_time() - start
    assert len(sites.patterns) == 32
    assert seconds < 2, seconds
