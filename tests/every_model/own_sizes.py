"""Fields of configs that the names of fields do not make small, or make so that they do not fit, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LINEAR, _FULL = "linear_attention", "full_attention"
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

OWN_SIZES: Mapping[str, Mapping[str, Any]] = {
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "num_groups": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 10000.0}}},
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", _FULL, "mlp", "sliding_attention", "mlp"],
    },
    "focalnet": {"image_size": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", _FULL] * 2,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", _FULL] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
    },
    "gemma4_unified_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", _FULL] * 2,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
    },
    "donut-swin": _SWIN,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": [_LINEAR, _FULL]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": 32},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", _FULL]},
    "lilt": {"hidden_size": 48},
    "llava": {"image_seq_length": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "longcat_flash": {
        "head_dim": 4,
        "num_key_value_heads": 4,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax": {"block_size": 4},
    "ministral": {"head_dim": 8},
    "mobilevitv2": {"image_size": 64},
    "nemotron": {"num_key_value_heads": 2},
    "paligemma": {"projection_dim": 32, "vision_config": {"projection_dim": 32}},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "qwen4_exp_text": {"ngram_vocab_size_base": 50, "hc_lowrank": 8, "ple_embed_dim": 16, "heads_per_ngram": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xlstm": {"embedding_dim": 32, "hidden_size": 64, "chunk_size": 4, "ffn_round_up_to_multiple_of": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR],
        "num_hidden_layers": 3,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "num_query_groups": 4,
        "adapter_rank": 4,
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2},
    },
}
