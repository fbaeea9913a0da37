"""Tiny random mixtures of experts, of each kind of transformers' that is told apart here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers as hf

_SIZE = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
_ONE = {**_SIZE, "num_key_value_heads": 2, "num_hidden_layers": 1, "num_experts_per_tok": 2}
_LATENT = {
    **_SIZE,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_CONFIGS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "mixtral": ("Mixtral", {**_ONE, "intermediate_size": 24, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_ONE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 5},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_ONE, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4}),
    "gpt_oss": (
        "GptOss",
        {**_ONE, "head_dim": 8, "intermediate_size": 32, "num_local_experts": 4, "sliding_window": 8},
    ),
    "olmoe": ("Olmoe", {**_ONE, "intermediate_size": 24, "num_experts": 6}),
    "deepseek_v2": ("DeepseekV2", _LATENT),
    "deepseek_v3": ("DeepseekV3", _LATENT),
}
MIXTURES = tuple(_CONFIGS)
_WITHOUT_GROUPS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama4": (
        "Llama4Text",
        {**_ONE, "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 4},
    ),
    "longcat_flash": (
        "LongcatFlash",
        {
            **_LATENT,
            "num_layers": 1,
            "head_dim": 4,
            "ffn_hidden_size": 40,
            "expert_ffn_hidden_size": 24,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
    ),
}
WITHOUT_GROUPS = tuple(_WITHOUT_GROUPS)
"""Mixtures whose code multiplies by all experts' weights at once, or by one expert's at a time."""


def mixture(name: str, **fields: object) -> hf.PreTrainedModel:
    """A model in eval mode; every parameter is off its initial value, the experts' biases too."""
    stem, config = {**_CONFIGS, **_WITHOUT_GROUPS}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(hf, f"{stem}Config")(**{**config, **fields})
        model = hf.AutoModelForCausalLM.from_config(made)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def router_of(name: str) -> str:
    """The router's module within its layer."""
    return "router" if name == "gpt_oss" else "gate"
