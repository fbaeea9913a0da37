"""Fields of configs of models of text and images that the names of fields do not make small, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURNED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ROPE = {"rope_parameters": _TURNED}
_HALF = {"rope_parameters": {**_TURNED, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
_GRID = {"depth": 2, "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}
_TILES = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_SQUARE = {"image_size": [32, 32], "patch_size": [8, 8]}
_DEEP = {**_GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_WINDOWS = {**_GRID, "window_size": 16, "fullatt_block_indexes": [1]}
_QWEN35 = {**_GRID, "num_position_embeddings": 16}
_FEATURES = {"vision_feature_layer": -1}
_CODES = {
    "num_embeddings": 20,
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
_FIRST_CODE = 40  #: the token of an image's first code
_CHAMELEON = {"IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(n)) + "Z": _FIRST_CODE + n for n in range(20)}
_EMU = {f"<|visual token {n:06d}|>": _FIRST_CODE + n for n in range(20)} | {"<|extra_200|>": 39}
_MINICPM = {"image_token_id": 98, "video_token_id": 97, "insert_layer_id": 1}
_INKLING = {"patch_size": 20, "text_hidden_size": 32, "projection_hidden_dim": 32, "posemb_grid_size": 4}
_INKLING_TEXT = {
    "unpadded_vocab_size": 99,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 4,
    "rel_extent": 64,
    "n_layers_per_attn_res_block": 2,
}
_SAM = {"image_size": 64, "output_channels": 16, "mlp_dim": 48, "global_attn_indexes": [1], "window_size": 4}
_MUSE = {"out_hidden_size": 128, "projector_hidden_size": 32}
_QFORMER = {"hidden_size": 32, "encoder_hidden_size": 32, "cross_attention_frequency": 2}

OWN_IMAGE_SIZES: Mapping[str, Mapping[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"num_query_tokens": 4, "image_token_index": 98},
    "blip_2_qformer": _QFORMER,
    "instructblip": {"num_query_tokens": 4, "image_token_index": 98},
    "instructblip_qformer": _QFORMER,
    "instructblipvideo": {"num_query_tokens": 4, "image_token_index": 98},
    "instructblipvideo_qformer": _QFORMER,
    "fast_vlm": {
        "vision_config": {
            "architecture": "fastvit_mci3",
            "image_size": 64,
            "hidden_size": 32,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1],
                "embed_dims": [8, 16],
                "mlp_ratios": [2, 2],
                "se_downsamples": [False, False],
                "downsamples": [False, True],
                "pos_embs": [None, None],
                "token_mixers": ["repmixer", "repmixer"],
                "lkc_use_act": True,
                "stem_use_scale_branch": False,
            },
        },
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 32,
                "img_size": [28, 28],
                "depth": 2,
                "num_heads": 4,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [2, 2],
            },
        },
    },
    "chameleon": {"vocabulary_map": {"<image>": 98, **_CHAMELEON}},
    "cohere_compass_vision": _DEEP,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": _TURNED,
            "sliding_attention": _TURNED,
        }
    },
    "emu3": {"vocabulary_map": {"<image>": 98, **_EMU}},
    "glm5_next_vision": _GRID,
    "qwen4_exp_vision": _QWEN35,
    "kimi_k25": {"projection_hidden_size": 32},
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minicpm_ocr": _MINICPM,
    "llama4_vision_model": {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
    },
    "textnet": {"image_size": [64, 64]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 20, "no_token_index": 21},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "diffusion_gemma_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
    },
    "gemma3n": {  # its embedding has tokens of images from 60 on, and of sounds from 80 on
        "vision_config": {
            "architecture": "test_byobnet",
            "hidden_size": 256,
            "vocab_offset": 60,
            "vocab_size": 20,
        },
        "audio_config": {
            "vocab_offset": 80,
            "vocab_size": 19,
            "input_feat_size": 16,
            **dict.fromkeys(("conf_attention_chunk_size", "conf_num_attention_heads"), 4),
            **dict.fromkeys(("conf_num_hidden_layers", "conf_reduction_factor"), 2),
            "conf_attention_context_left": 5,
            "sscp_conv_channel_size": [8, 4],
        },
        "audio_soft_tokens_per_image": 60,
        "vision_soft_tokens_per_image": 4,
        "image_token_id": 65,
        "audio_token_id": 85,
    },
    "gemma4": {
        "vision_config": {
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
            **dict.fromkeys(("head_dim", "patch_size"), 8),
            **dict.fromkeys(("num_hidden_layers", "pooling_kernel_size"), 2),
            "hidden_size": 32,
            "intermediate_size": 48,
            "position_embedding_size": 16,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "subsampling_conv_channels": [16, 4],
            "output_proj_dims": 24,
            **dict.fromkeys(("attention_chunk_size", "attention_context_left"), 4),
        },
    },
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192, "seq_len": 32},
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": 32,
    },
    "qwen2_vl_vision": {**_GRID, "embed_dim": 32, "hidden_size": 32},
    "qwen2_vl_text": _ROPE,
    "qwen2_5_vl_vision": _WINDOWS,
    "qwen2_5_vl_text": _ROPE,
    "qwen2_5_omni_vision_encoder": _WINDOWS,
    "qwen2_5_omni_text": _ROPE,
    "qwen3_vl_vision": _DEEP,
    "qwen3_vl_text": _ROPE,
    "qwen3_vl_moe_vision": _DEEP,
    "qwen3_vl_moe_text": _ROPE,
    "qwen3_omni_moe_vision_encoder": _DEEP,
    "qwen3_omni_moe_text": _ROPE,
    "qwen3_5_vision": _QWEN35,
    "qwen3_5_moe_vision": _QWEN35,
    "exaone4_5_vision": _WINDOWS,
    "paddleocr_vl_text": _ROPE,
    "internvl_vision": _SQUARE,
    "qianfan_ocr_vision": _SQUARE,
    "glm4v_text": _ROPE,
    "glm46v_text": _ROPE,
    "glm4v_moe_text": _HALF,
    "glm_ocr_text": _HALF,
    "glm4v_vision": _GRID,
    "glm46v_vision": _GRID,
    "glm4v_moe_vision": _GRID,
    "glm_ocr_vision": _GRID,
    "glmga_vision": _GRID,
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "granite_docling_vision": {"out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
    "cosmos3_edge": {"projector_hidden_size": 32},
    "cosmos3_edge_text": _ROPE,
    "cosmos3_edge_vision": {"num_patches": 16},
    "deepseek_vl_hybrid": {"high_res_vision_config": {**_SAM, "num_pos_feats": 8}},
    "unlimited_ocr_sam_vision_model": {**_SAM, "downsample_channels": [16, 32]},
    "hunyuan_vl_vision": {"out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 64},
    "hunyuan_vl_text": {**_ROPE, "head_dim": 8},
    "hy_v4_vl_vision": {"out_hidden_size": 32, "max_image_size": 64},
    "hy_v4_vl_text": {**_ROPE, "qk_rope_head_dim": 8},
    "inkling2_vision": _INKLING,
    "inkling2_text": _INKLING_TEXT,
    "inkling2_loop_vision": _INKLING,
    "inkling2_loop_text": _INKLING_TEXT,
    "molmo2_vision": {"image_size": [32, 32], "num_position_embeddings": 16},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2], "text_hidden_size": 32},
    "molmo2": {"image_patch_id": 98},
    "molmo2_text": {"additional_vocab_size": 8},
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
    "muse_spark_text": {"moe_hidden_size": 32},
    "muse_spark_audio": {
        "patch_sizes": [4, 2],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "out_hidden_size": 32,
    },
    "nemotron_h_omni": {
        "image_token_id": 98,
        "projector_hidden_size": 32,
        "vision_hidden_size": 32,
        "vision_config": {"video_temporal_patch_size": 2},
        "audio_config": {
            "model_type": "parakeet_encoder",
            "subsampling_conv_channels": 8,
            "num_mel_bins": 16,
            "projection_hidden_size": 24,
            "projection_bias": True,
        },
        "audio_token_id": 96,
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 95},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 95},
    "deepseek_ocr2_sam_vision_model": {**_SAM, "downsample_channels": [16, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "step3p5": {"sliding_window": 4, "share_expert_dim": 24},
    "gemma4_unified": {
        "vision_config": {
            **dict.fromkeys(("mm_embed_dim", "output_proj_dims"), 48),
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "mm_posemb_size": 16,
        },
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 40},
    },
    "granite4_vision": {
        **_TILES,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [2, 3],
        "vision_config": {"hidden_size": 64},
        "text_config": {"num_hidden_layers": 4},
    },
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "janus_vision_model": {"num_image_tokens": 16, "projection_dim": 32},
    "janus_vqgan": {**_CODES, "projection_dim": 32, "image_token_embed_dim": 32},
    "mistral3": {"spatial_merge_size": 2, **_FEATURES},
    "mistral_large4": {"spatial_merge_size": 2, **_FEATURES},
    "lighton_ocr": {"spatial_merge_size": 2},
    "siglip2_vision_model": {"num_patches": 16},
    "emu3_vqgan": {**_CODES, "codebook_size": 20, "hidden_size": 32, "attn_resolutions": [8]},
    "chameleon_vqgan": {**_CODES, "resolution": 32},
    "video_llava": {"image_seq_length": 17, "video_seq_length": 17},
    "idefics2_perceiver": {
        "hidden_size": 32,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
    },
    "mllama_vision_model": {
        "attention_heads": 4,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
}
