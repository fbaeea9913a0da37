"""Latent attentions: keys and values projected from a latent, keys filled piece by piece, scores behind a maximum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import peftfx

_SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def latent(**more: Any) -> nn.Module:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = hf.DeepseekV3Config(
        **_SIZES, **sizes, **experts, num_hidden_layers=2, moe_intermediate_size=24, first_k_dense_replace=1, **more
    )
    torch.manual_seed(0)
    return hf.DeepseekV3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A model of latent attentions, with a LoRA on what is new about them."""
    target = "attention.query_down | attention.kv_down | attention.key"
    return peftfx.transform(latent(), peftfx.LoRA(r=2, target=target, init_lora_weights=False))


def test_a_latent_attention_has_its_five_layers(adapted: Any) -> None:
    roles = {s.path.rpartition(".")[2]: s.role for s in adapted.sites.weights if s.layer == 1 and "attn" in s.path}
    assert roles == {
        "q_a_proj": "attention.query_down",
        "q_b_proj": "attention.query",
        "kv_a_proj_with_mqa": "attention.kv_down",
        "kv_b_proj": "attention.kv",
        "o_proj": "attention.output",
    }
    both = next(s for s in adapted.sites.weights if s.path.endswith("0.self_attn.kv_b_proj"))
    parts = {part.role: part.rows for part in both.parts}
    assert parts == {
        "attention.key": ((0, 8), (16, 24), (32, 40), (48, 56)),
        "attention.value": ((8, 16), (24, 32), (40, 48), (56, 64)),
    }


def test_an_adapted_latent_attention_is_its_merged_one(adapted: Any) -> None:
    ids = torch.randint(5, 99, (3, 6))
    with torch.no_grad():
        want, plain = adapted(input_ids=ids).logits, latent()(input_ids=ids).logits
        adapted.merge()
        merged = adapted.remove()(input_ids=ids).logits
    assert float((want - plain).abs().max()) > 1e-3
    torch.testing.assert_close(merged, want, atol=1e-5, rtol=1e-5)


def test_keys_that_are_filled_in_pieces_are_one_concatenation() -> None:
    graph = peftfx.capture(latent())
    assert not [node for node in graph.nodes() if "copy_" in str(node.target) and "to_copy" not in str(node.target)]


class Filled(nn.Module):
    """A tensor that is filled in ways which are, and are not, the concatenation of its pieces."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x.new_empty(*x.shape[:-1], 6)
        first, second = self.layer(x), x[..., :1]
        if self.way == "early":
            made.fill_(1.0)
        made[..., :4].copy_(first)
        view = made[..., 2:] if self.way == "seen" else made
        if self.way == "wide":
            made[..., 4:].copy_(second)
        elif self.way == "half":
            made[..., 4:].copy_(second.half())
        elif self.way == "over":
            made[..., 3:].copy_(second)
        elif self.way == "seen":
            made[..., 4:].copy_(second)
            return made + view.sum()
        else:
            made[..., 4:6].copy_(torch.cat([second, second], -1))
        return made * 2


@pytest.mark.parametrize("way", ["plain", "wide", "half", "over", "seen", "early"])
def test_however_a_tensor_is_filled_it_has_its_values(way: str) -> None:
    torch.manual_seed(0)
    model, x = Filled(way).eval(), torch.randn(3, 4)
    graph, other = peftfx.capture(model, {"x": x}), torch.randn(5, 4)
    torch.testing.assert_close(graph(x=other), model(other))
    written = any("copy_" in str(n.target) and "to_copy" not in str(n.target) for n in graph.nodes())
    assert written == (way in ("over", "seen", "early"))


def test_a_maximum_of_scores_is_seen_through() -> None:
    config = hf.XGLMConfig(vocab_size=99, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4)
    roles = {s.path.rpartition(".")[2]: s.role for s in peftfx.capture(hf.XGLMForCausalLM(config).eval()).sites.weights}
    assert roles["q_proj"] == "attention.query"
    assert roles["out_proj"] == "attention.output"


def test_an_activation_of_two_branches_is_one() -> None:
    config = hf.ApertusConfig(**_SIZES, num_hidden_layers=1, num_key_value_heads=2)
    roles = {s.path.rpartition(".")[2]: s.role for s in peftfx.capture(hf.ApertusForCausalLM(config).eval()).sites}
    assert roles["up_proj"] == "mlp.up"
    assert roles["down_proj"] == "mlp.down"
