"""The task that HF PEFT writes into an adapter's config, on bases that write texts about images or sounds."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from every_model.checks import build
from support.adapted import randomise

from peftfx.bases.tasks import resolve_task
from peftfx.export.directories import load_directories

BASES = [
    ("image-text-to-text", "llava", "CAUSAL_LM"),
    pytest.param("image-text-to-text", "qwen2_vl", "CAUSAL_LM", marks=pytest.mark.further),
    ("speech-to-text", "whisper", "SEQ_2_SEQ_LM"),
    pytest.param("speech-to-text", "voxtral", "CAUSAL_LM", marks=pytest.mark.further),
]


@pytest.mark.parametrize(("task", "kind", "told"), BASES)
def test_a_type_of_text_leaves_the_base_its_class(task: str, kind: str, told: str, tmp_path: Path) -> None:
    base = build(task, kind)
    if kind == "qwen2_vl":  # its processor says what sizes pictures have
        shutil.copytree(base.config.name_or_path, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=told))
    randomise(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_directories(tmp_path / "base", {"a": tmp_path / "adapter"})
    assert type(adapted.base) is type(base)
    found = dict(adapted.adapter("a").named_parameters())
    assert len(found) == sum("lora_" in name for name, _ in model.named_parameters())
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_type_that_the_base_has_a_class_for_chooses_it() -> None:
    told = {"architectures": ["MBartForConditionalGeneration"], "model_type": "mbart"}
    assert resolve_task(None, peft_task_type="CAUSAL_LM", config=told) == "text-generation"
    heard = {"architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio"}
    assert resolve_task(None, peft_task_type="CAUSAL_LM", config=heard) == "text2text-generation"
    assert resolve_task(None, peft_task_type="SEQ_CLS", config=heard) == "text-classification"
