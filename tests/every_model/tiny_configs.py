"""Tiny configs of whatever model type: the type's own defaults, their sizes made small by the names of the fields."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from every_model.own_detector_sizes import OWN_DETECTOR_SIZES
from every_model.own_image_sizes import OWN_IMAGE_SIZES
from every_model.own_sizes import OWN_SIZES as SIZES
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Fields = dict[str, Any]

WIDTH, HEADS, KEPT, INNER, WORDS = 32, 4, 2, 48, 99
_MOST_LAYERS = 6  #: where several are needed until each kind of layer has come

_SMALL: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "num_attn_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KEPT),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dff", "hidden_dim"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "inner_dim", "mlp_hidden_size"), INNER),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "experts_per_token", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_expert_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "n_ctx"), 64),
    **dict.fromkeys(("max_target_positions", "max_length_positions"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank",), 16),
    **dict.fromkeys(("kv_lora_rank",), 12),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_head_dim",), 8),
    **dict.fromkeys(("index_topk",), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_attention"), 4),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("type_vocab_size",), 2),
    **dict.fromkeys(("embedding_size",), 16),
    **dict.fromkeys(("projection_dim",), 24),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_heads",), 4),
    **dict.fromkeys(("linear_head_dim",), 8),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_state_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("num_mel_bins",), 8),
    **dict.fromkeys(("max_source_positions",), 16),
    **dict.fromkeys(("num_labels",), 3),
    **dict.fromkeys(("rope_head_dim", "rotary_dim"), 4),
}
_TOKENS: Mapping[str, int] = {
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 4,
    "forced_eos_token_id": 3,
    "forced_bos_token_id": 2,
    "sep_token_id": 3,
    "cls_token_id": 2,
    "image_token_id": 98,
    "image_token_index": 98,
    "video_token_id": 97,
    "audio_token_id": 96,
    "vision_start_token_id": 95,
    "vision_end_token_id": 94,
}
OWN_SIZES: Mapping[str, Mapping[str, Any]] = {**SIZES, **OWN_IMAGE_SIZES, **OWN_DETECTOR_SIZES}
_KINDS = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern", "mlp_layer_types")


def tiny_config(model_type: str, model: type, **more: Any) -> PreTrainedConfig:
    """A config of this type whose model is built in no time.

    Args:
        model_type: as transformers has it.
        model: the class that it is for, which may want a part of it alone.
        more: fields that are set to these values, whatever is said of them elsewhere.
    """
    kind = getattr(model, "config_class", None) or CONFIG_MAPPING[model_type]
    return shrunk(kind, {**OWN_SIZES.get(kind.model_type, {}), **OWN_SIZES.get(model_type, {}), **more})


def shrunk(kind: type[PreTrainedConfig], own: Mapping[str, Any]) -> PreTrainedConfig:
    """A config of this class; fields in `own` are set to their values, and parts in it are shrunk with theirs."""
    try:
        default = kind()
    except Exception:  # it has fields without defaults, or defaults that do not fit
        default = kind(**{name: value for name, value in own.items() if not isinstance(value, Mapping)})
    made: Fields = {}
    for name, value in _fields(default).items():
        if name in own and not isinstance(value, PreTrainedConfig) and name not in kind.sub_configs:
            made[name] = own[name]
        elif isinstance(value, PreTrainedConfig):
            part = {**own.get(name, {})}
            named = part.pop("model_type", value.model_type)  # a backbone of another type than the default
            part_kind = type(value) if named == value.model_type else CONFIG_MAPPING[named]
            made[name] = shrunk(part_kind, {**OWN_SIZES.get(named, {}), **part})
        elif (small := _small(name, value, default)) is not None:
            made[name] = small
    made |= {name: value for name, value in own.items() if name not in made and name not in kind.sub_configs}
    for name in (name for name in kind.sub_configs if name in own and name not in made):  # left out by default
        part = {**own[name]}
        named = part.pop("model_type", None)
        made[name] = part if named is None else shrunk(CONFIG_MAPPING[named], {**OWN_SIZES.get(named, {}), **part})
    return kind(**made)


def _fields(config: PreTrainedConfig) -> Fields:
    """What a config is made of: the arguments of its class that it has a value for."""
    accepted = {
        n for k in type(config).__mro__ if "__init__" in vars(k) for n in inspect.signature(k.__init__).parameters
    }
    told = config.to_dict()  # a field that differs from layer to layer can be read nowhere else
    parts = {n: v for n in accepted if isinstance(v := vars(config).get(n), PreTrainedConfig)}
    return {n: told.get(n) for n in accepted if n in told} | parts | {"num_labels": config.num_labels}


def _small(name: str, value: object, config: PreTrainedConfig) -> object:
    """A smaller value for a field; `None` where it stays."""
    if name in _TOKENS or name.endswith(("_token_id", "_token_index", "_token_ids")):
        return _token(name, value)
    if "vocab_size" in name and isinstance(value, int):
        return min(value, WORDS) if name != "type_vocab_size" else min(value, 2)
    if name in ("num_key_value_heads", "num_kv_heads") and value is not None:
        heads = config.to_dict().get("num_attention_heads")
        return HEADS if value == heads else 1 if value == 1 else KEPT
    if name == "embedding_size" and value == config.to_dict().get("hidden_size"):
        return WIDTH
    if name in ("num_hidden_layers", "n_layer", "num_layers"):
        return _layers(config)
    if name in _KINDS and isinstance(value, (list, tuple, str)):
        return value[: _layers(config)]
    if name in _SMALL and isinstance(value, (int, float)) and not isinstance(value, bool):
        return min(int(value), _SMALL[name]) if value > 0 else value
    return None


def _token(name: str, value: object) -> object:
    if isinstance(value, int) and value >= 0:
        return _TOKENS.get(name, 5 + sum(map(ord, name)) % 85)
    return [3] if isinstance(value, list) and name == "eos_token_id" else None


def _layers(config: PreTrainedConfig) -> int:
    """Two layers, or as many as it takes until each kind has come."""
    kinds = [k for name in _KINDS if isinstance(k := getattr(config, name, None), (list, tuple, str)) and len(k)]
    needed = [max(list(k).index(kind) for kind in set(k)) + 1 for k in kinds]
    return max(2, *(n for n in needed if n <= _MOST_LAYERS), 2)
