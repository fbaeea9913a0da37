"""TRL's trainers with `torch_compile`: the losses are `peft`'s."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.zoo import ZOO
from trainers.trl_runs import dpo, peft_model, sft

import peftfx

OPTIONS = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}


@pytest.mark.parametrize("trainer", ["sft", pytest.param("dpo", marks=pytest.mark.further)])
def test_a_compiled_trainer_has_the_losses_of_peft(trainer: str, tmp_path: Path) -> None:
    """TRL's forward runs the model's `base_model`, and ended in dynamo's error about an attribute of that."""
    options = {"lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    peft.get_peft_model(ZOO["llama"].build(), config).save_pretrained(str(tmp_path / "adapter"))
    ours, theirs = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter"), peft_model(tmp_path / "adapter")
    seen = []
    for model in (ours, theirs):
        torch._dynamo.reset()
        if trainer == "sft":
            seen.append(sft(model, tmp_path, **OPTIONS))
            continue
        if model is ours:
            ours.load_adapter(tmp_path / "adapter", "ref")
            ours.set_adapter("default")
        seen.append(dpo(model, tmp_path, ours.reference("ref") if model is ours else None, **OPTIONS))
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)
    assert len(set(seen[0])) == 2
