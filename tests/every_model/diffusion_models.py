"""Tiny denoisers of diffusion pipelines: U-Nets, a ControlNet and transformers of diffusers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
_IMAGE = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
_JOINT = {"joint_attention_dim": 24, "caption_projection_dim": 32}
_ROPE = {"patch_size": 1, "in_channels": 8, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 24}
_BLOCKS = {"num_layers": 1, "num_single_layers": 1}

#: The class of diffusers, and what its config has beside the defaults.
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "unet": ("UNet2DConditionModel", {**_UNET, **_UP}),
    "unet-sdxl": (
        "UNet2DConditionModel",
        {
            **_UNET,
            **_UP,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        },
    ),
    "unet-unconditional": (
        "UNet2DModel",
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
    ),
    "controlnet": (
        "ControlNetModel",
        {name: value for name, value in _UNET.items() if name != "sample_size"}
        | {"conditioning_embedding_out_channels": (8, 16)},
    ),
    "dit": ("DiTTransformer2DModel", {**_HEADS, **_IMAGE, "num_layers": 2, "num_embeds_ada_norm": 10}),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_IMAGE,
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "use_additional_conditions": True,
            "norm_num_groups": 4,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {**_HEADS, **_IMAGE, **_JOINT, "num_layers": 2, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**_HEADS, **_ROPE, **_BLOCKS, "pooled_projection_dim": 16, "guidance_embeds": True},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {**_HEADS, **_IMAGE, **_JOINT, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 64},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **_HEADS,
            **_IMAGE,
            "num_layers": 1,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **_HEADS,
            **_ROPE,
            **_BLOCKS,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        },
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {
            **_HEADS,
            **_IMAGE,
            "num_layers": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "rope_axes_dim": (16, 16),
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            **_IMAGE,
            "hidden_size": 32,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 24,
        },
    ),
}


def has_diffusers() -> bool:
    """Whether diffusers is installed; without it these models are not run."""
    return importlib.util.find_spec("diffusers") is not None


def build_denoiser(name: str) -> nn.Module:
    """An untouched model of random weights."""
    import diffusers

    kind, fields = MODELS[name]
    model: nn.Module = getattr(diffusers, kind)(**fields)
    return model.eval()
