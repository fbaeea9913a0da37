"""Tiny processors of pictures for models of text and images, by model type, as transformers' own classes save them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers as hf
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

_GRID = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
_QWEN = {**_GRID, "class": "Qwen2VLImageProcessor"}
_GLM = {**_GRID, "class": "Glm4vImageProcessor"}
_LONGEST = {"size": {"longest_edge": 32}, "patch_size": 8}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
_TILES_3 = {**_TILES, "class": "Idefics3ImageProcessor"}
_SLICES = {"patch_size": 8, "scale_resolution": 64, "slice_mode": False}
_SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
_ANYRES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": _PINPOINTS}

#: Fields of a type's processor, which is of the class that transformers names, or of `class`.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _GRID),
    **dict.fromkeys(("cohere_compass", "cosmos3_edge", "cosmos3_omni", "exaone4_5", "hyperclovax_vision_v2"), _GRID),
    **dict.fromkeys(("glm4v", "glm46v", "glm5_next", "glmga", "ernie4_5_vl_moe", "minimax_m3_vl"), _GRID),
    **dict.fromkeys(("dots3_note", "lfm3_vl", "muse_glimmer", "muse_spark", "hunyuan_vl", "hy_v4_vl"), _GRID),
    **dict.fromkeys(("paddleocr_vl", "video_llama_3"), _GRID),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen3_vl_moe"), _QWEN),
    **dict.fromkeys(("glm4v_moe", "glm_ocr"), _GLM),
    **dict.fromkeys(("idefics3", "smolvlm"), _TILES),
    "granite_docling": {"size": {"height": 32, "width": 32}, "max_patches": 4},
    "idefics2": {"size": {"shortest_edge": 24, "longest_edge": 32}},
    **dict.fromkeys(("llava_next", "llava_next_video", "granite4_vision"), _ANYRES),
    "llava_onevision": {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": _PINPOINTS},
    **dict.fromkeys(("mistral3", "mistral_large4", "lighton_ocr"), _LONGEST),
    "mllama": {"size": {"height": 32, "width": 32}, "max_image_tiles": 4},
    "lfm2_vl": {
        "encoder_patch_size": 8,
        "tile_size": 32,
        "max_image_tokens": 16,
        "min_image_tokens": 4,
        "use_thumbnail": False,
    },
    "gemma4": {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2},
    "gemma3n": {"class": "SiglipImageProcessor", "size": {"height": 64, "width": 64}},
    "florence2": {"class": "CLIPImageProcessor", **_SQUARE},
    "chameleon": _SQUARE,
    "gemma4_unified": {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2},
    "inkling2": {},
    "inkling2_loop": {},
    "nemotron_h_omni": {"patch_size": 8, "min_num_patches": 16, "max_num_patches": 64},
    "molmo2": {"size": {"height": 32, "width": 32}, "patch_size": 8, "max_crops": 1, "overlap_margins": [0, 0]},
    "step3p7": {"size": {"height": 32, "width": 32}, "patch_size": 8},
    "deepseek_vl_hybrid": {
        "size": {"height": 32, "width": 32},
        "high_res_size": {"height": 64, "width": 64},
        "min_size": 8,
    },
    "kimi_k25": {"patch_size": 8, "merge_size": 2, "size": {"max_height": 512, "max_width": 512}},
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _SLICES),
    **dict.fromkeys(("modernvbert", "ultravbert"), _TILES_3),
    "perception_lm": {"size": {"height": 28, "width": 28}, "tile_size": 28, "max_num_tiles": 2},
    "siglip2": {"patch_size": 8, "max_num_patches": 16},
    "pix2struct": {"patch_size": {"height": 8, "width": 8}, "max_patches": 16, "is_vqa": False},
    "neomme": {"patch_size": 8},
    "emu3": {"min_pixels": 256, "max_pixels": 1024, "spatial_factor": 2},
}


#: The class of a type's extractor of sounds and its fields, where texts have sounds too.
_HEARD: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3n": ("Gemma3nAudioFeatureExtractor", {"feature_size": 16}),
    "gemma4": ("Gemma4AudioFeatureExtractor", {"feature_size": 16}),
    "gemma4_unified": ("Gemma4UnifiedAudioFeatureExtractor", {"feature_size": 40, "audio_samples_per_token": 40}),
}


def has_pictures(model_type: str) -> bool:
    """Whether a type has a processor here: its pictures are more than pixels of one size."""
    return model_type in _FIELDS


@functools.cache
def home_of(model_type: str) -> str:
    """A directory with the type's processor."""
    fields = {**_FIELDS[model_type]}
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    kind = fields.pop("class", None) or names.get("torchvision") or names["pil"]
    home = tempfile.TemporaryDirectory()
    _HOMES.append(home)
    made = getattr(hf, kind)(**fields)
    if model_type not in _HEARD:
        made.save_pretrained(home.name)
        return str(Path(home.name))
    heard, options = _HEARD[model_type]
    parts = {"image_processor": made, "feature_extractor": getattr(hf, heard)(**options)}
    told = {name: json.loads(part.to_json_string()) for name, part in parts.items()}
    (Path(home.name) / "processor_config.json").write_text(json.dumps(told), encoding="utf-8")
    return str(Path(home.name))


_HOMES: list[tempfile.TemporaryDirectory[str]] = []  #: removed when the process ends
