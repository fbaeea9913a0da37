"""Fields of configs of models that find, segment and measure what is in an image, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WIDTHS = [16, 16, 24, 32]
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": _WIDTHS,
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_PYRAMID = {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}
_ALL_STAGES = {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_RT_RESNET = {**_PYRAMID, "model_type": "rt_detr_resnet", "layer_type": "basic"}
_HGNET = {
    "stem_channels": [3, 8, 8],
    "hidden_sizes": _WIDTHS,
    "embedding_size": 8,
    "stage_in_channels": [8, 16, 16, 24],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": _WIDTHS,
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_UNTIED = {"tie_word_embeddings": False}  #: `peft` looks for the embedding of others, which these have not
_DETR = {
    **_UNTIED,
    "backbone_config": _RESNET,
    "num_queries": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_DEFORMABLE = {**_DETR, "backbone_config": _PYRAMID}
_HYBRID = {
    **_UNTIED,
    "backbone_config": _RT_RESNET,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": _WIDTHS[1:],
    "encoder_ffn_dim": 48,
    "encoder_layers": 1,
    "d_model": 32,
    "num_queries": 8,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_denoising": 0,
    "lqe_hidden_dim": 16,
}
_HYBRID_HGNET = {**_HYBRID, "backbone_config": _HGNET}
_READING = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "global_pointer_head_size": 8,
}
_WINDOWED = {
    "image_size": 64,
    "patch_size": 16,
    "num_windows": 4,
    "window_block_indices": [0],
    "pretrain_image_size": 64,
}
_SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_GROUNDING = {
    **_UNTIED,
    "backbone_config": {**_SWIN, "out_features": ["stage2", "stage3", "stage4"]},
    "text_config": {"hidden_size": 32},
    "num_queries": 6,
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_VIT = {"num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
_DINO = {"model_type": "dinov2", **_VIT, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
_NECK = {"neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16}
_DEPTH = {"backbone_config": _DINO, "reassemble_hidden_size": 32, **_NECK, "head_hidden_size": 8}

_SAM = {
    "prompt_encoder_config": {"image_size": 64, "patch_size": 8, "hidden_size": 32, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 48, "iou_head_hidden_dim": 16, "num_attention_heads": 4},
}
_SAM_VISION = {"image_size": 64, "output_channels": 32, "num_pos_feats": 16, "mlp_dim": 48, "global_attn_indexes": [1]}
_SAM_1 = {**_SAM, "vision_config": {**_SAM_VISION, "window_size": 4}}
_HIERA = {
    "image_size": [128, 128],
    "hidden_size": 8,
    "query_stride": [2, 2],
    "blocks_per_stage": [1, 1, 1, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads": 1,
    "num_attention_heads_per_stage": [1, 2, 4, 4],
    "window_size_per_stage": [8, 4, 4, 4],
    "global_attention_blocks": [],
    "window_positional_embedding_background_size": [2, 2],
}
_SAM_2 = {
    **_SAM,
    "prompt_encoder_config": {**_SAM["prompt_encoder_config"], "image_size": 128, "patch_size": 16},
    "vision_config": {
        "backbone_config": _HIERA,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
}
_SAM_3 = {
    **_SAM,
    "vision_config": {
        "backbone_config": {"image_size": 64, "pretrain_image_size": 32, "window_size": 4, "global_attn_indexes": [1]},
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
}

OWN_DETECTOR_SIZES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("conditional_detr", "table-transformer"), _DETR),
    "detr": {
        **_DETR,
        "backbone_config": _ALL_STAGES,
        "d_model": 64,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
    },
    "dab-detr": {**_DETR, "hidden_size": 32},
    "deformable_detr": {**_DEFORMABLE, "d_model": 64},
    **dict.fromkeys(("rt_detr", "rt_detr_v2"), _HYBRID),
    **dict.fromkeys(("d_fine", "deimv2", "pp_doclayout_v4"), _HYBRID_HGNET),
    "pp_doclayout_v2": {
        **_HYBRID_HGNET,
        "reading_order_config": _READING,
        "class_order": [0, 1, 2],
        "class_thresholds": [0.5, 0.5, 0.5],
    },
    "pp_doclayout_v3": {
        **_HYBRID_HGNET,
        "backbone_config": {**_HGNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "mask_feature_channels": [8, 8],
        "x4_feat_dim": 16,
    },
    "lw_detr": {
        "backbone_config": {**_WINDOWED, "out_indices": [1, 2]},
        "num_queries": 6,
        "projector_scale_factors": [1.0],
    },
    "rf_detr": {
        "backbone_config": {**_WINDOWED, "num_windows": 2, "window_block_indexes": [0], "out_indices": [1, 2]},
        "num_queries": 6,
    },
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino"), _GROUNDING),
    "owlvit": {"projection_dim": 32},
    "owlv2": {"projection_dim": 32},
    "upernet": {"backbone_config": _ALL_STAGES, "hidden_size": 16, "auxiliary_channels": 16, "pool_scales": [1, 2]},
    "dpt": {**_VIT, "backbone_out_indices": [0, 1, 2, 3], **_NECK},
    "tipsv2_dpt": {"backbone_config": {**_VIT, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}, **_NECK},
    **dict.fromkeys(("depth_anything", "prompt_depth_anything"), _DEPTH),
    "mask2former": {
        "backbone_config": _SWIN,
        "feature_size": 64,
        "mask_feature_size": 64,
        "hidden_dim": 64,
        "num_queries": 6,
    },
    "maskformer": {
        "backbone_config": _SWIN,
        "decoder_config": _DETR,
        "fpn_feature_size": 64,
        "mask_feature_size": 64,
    },
    "oneformer": {
        "backbone_config": _SWIN,
        **dict.fromkeys(("hidden_dim", "conv_dim", "mask_dim", "dim_feedforward", "encoder_feedforward_dim"), 64),
        "text_encoder_width": 64,
        "text_encoder_n_ctx": 2,
        "text_encoder_context_length": 9,
        "task_seq_len": 9,
        "decoder_layers": 3,
        "num_queries": 6,
        "use_auxiliary_loss": False,
    },
    "sam": _SAM_1,
    "sam_hq": {**_SAM_1, "mask_decoder_config": {**_SAM["mask_decoder_config"], "vit_dim": 32}},
    "sam2": _SAM_2,
    "sam3_tracker": _SAM_3,
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "zoedepth": {
        "backbone_config": {**_VIT, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
        **_NECK,
        "bottleneck_features": 16,
    },
    "chmv2": {
        "backbone_config": {**_VIT, "out_indices": [1, 2, 3, 4], "return_class_token": True},
        "post_process_channels": [8, 16, 24, 32],
    },
    "depth_pro": {
        "patch_size": 16,
        "image_model_config": {"image_size": 16},
        "patch_model_config": {"image_size": 16},
        "fov_model_config": {"image_size": 16},
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [32, 32, 16],
        "fusion_hidden_size": 16,
    },
    "swin2sr": {"image_size": 16, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "vitpose": {"backbone_config": {"image_size": [64, 48], "out_indices": [2]}},
    "vitmatte": {
        "backbone_config": {"patch_size": 16, "image_size": 64, "pretrain_image_size": 64, "out_indices": [2]},
        "hidden_size": 32,
        "convstream_hidden_sizes": [8, 8, 16],
        "fusion_hidden_sizes": [16, 8, 8, 8],
    },
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4, "pred_hidden_size": 32, "pred_num_attention_heads": 4},
    "segformer": {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16},
    "glpn": {"hidden_sizes": [8, 16, 40, 64], "decoder_hidden_size": 16},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
        "aspp_out_channels": 16,
    },
}
