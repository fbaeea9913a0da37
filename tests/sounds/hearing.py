"""Tiny models that write sounds into their text, and adapters of `peft` in all their layers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.few import but_further
from torch import Tensor, nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxWarning

SOUND = 96  # the token of a sound's piece
_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_HEARD = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}


def configured(kind: type[hf.PreTrainedConfig], text: str, heard: str) -> hf.PreTrainedConfig:
    parts = {"text_config": {"model_type": text, **_TEXT}, "audio_config": {"model_type": heard, **_HEARD}}
    return kind(**parts, audio_token_id=SOUND)


def voxtral() -> nn.Module:
    """Sounds of one length, without masks."""
    return hf.VoxtralForConditionalGeneration(configured(hf.VoxtralConfig, "llama", "voxtral_encoder")).eval()


def flamingo() -> nn.Module:
    """Sounds of one length, whose masks say how long each is."""
    config = configured(hf.AudioFlamingo3Config, "qwen2", "audioflamingo3_encoder")
    return hf.AudioFlamingo3ForConditionalGeneration(config).eval()


def granite() -> nn.Module:
    """Sounds read by a Q-Former, whose queries are those of all sounds."""
    config = hf.GraniteSpeechConfig(
        text_config={"model_type": "granite", **{k: v for k, v in _TEXT.items() if k != "head_dim"}},
        encoder_config={
            "model_type": "granite_speech_encoder",
            "input_dim": 12,
            "num_layers": 2,
            "hidden_dim": 16,
            "num_heads": 2,
            "dim_head": 8,
            "context_size": 20,
            "max_pos_emb": 32,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "vocab_size": 99,
        },
        audio_token_index=SOUND,
        window_size=6,
        downsample_rate=3,
        has_lora_adapter=False,
    )
    return hf.GraniteSpeechForConditionalGeneration(config).eval()


def qwen() -> nn.Module:
    """Sounds of one length that the forward encodes itself."""
    heard = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    text = {"model_type": "qwen2", **_TEXT}
    config = hf.Qwen2AudioConfig(audio_config=heard, text_config=text, audio_token_index=SOUND)
    return hf.Qwen2AudioForConditionalGeneration(config).eval()


MODELS = {"qwen": qwen, "voxtral": voxtral, "flamingo": flamingo, "granite": granite}
#: For tests of each model: the default run has one with a method that encodes sounds, and the one without.
KINDS = but_further({*MODELS} - {"qwen"}, MODELS)


def adapted_by_peft(kind: str, directory: Path, alpha: int = 8) -> peft.PeftModel:
    """A model with adapters in its sound encoder too."""
    torch.manual_seed(0)
    made = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear"))
    randomise(made.eval())
    made.save_pretrained(str(directory))
    return made


def loaded(kind: str, directory: Path) -> peftfx.AdaptedModel:
    torch.manual_seed(0)
    return peftfx.load(MODELS[kind](), directory)


def exported_once(view: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[peft.PeftModel, Path]]:
    """A function of a kind: the model that `peft` adapted, and the directory of its export, which is made once."""

    @functools.cache
    def make(kind: str) -> tuple[peft.PeftModel, Path]:
        root = tmp_path_factory.mktemp(kind)
        want = adapted_by_peft(kind, root / "adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftfxWarning)  # nothing is left out
            loaded(kind, root / "adapter").export(root / "onnx", view=view)
        return want, root / "onnx"

    return make


def prompts_with_sounds(model: nn.Module, texts: int) -> dict[str, Tensor]:
    """Prompts with a sound each; the last of several is padded on the left."""
    made = example_inputs(model, sizes={"batch": texts, "sequence": 6, "sounds": texts}, seed=3)
    mask = torch.ones_like(made["attention_mask"])
    if texts > 1:
        mask[1, :2] = 0
        made["input_ids"][1] = made["input_ids"][1].roll(2)  # its first two tokens are text
    return {**made, "attention_mask": mask}
