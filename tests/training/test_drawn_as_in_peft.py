"""What methods draw in training: dropout, noise and chosen skills are those of `peft` under the same seed."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise, trained
from torch import nn

import peftfx

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
BOTH = {"target_modules": ["0", "2"]}
CONFIGS = {
    "LoRA, PiSSA": peft.LoraConfig(r=2, lora_dropout=0.4, init_lora_weights="pissa", **BOTH),
    "DoRA, PiSSA": peft.LoraConfig(r=2, lora_dropout=0.4, init_lora_weights="pissa", use_dora=True, **BOTH),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, lora_dropout=0.4, total_step=20, tinit=2, tfinal=2, **BOTH),
    "BOFT": peft.BOFTConfig(boft_block_size=2, boft_dropout=0.6, **BOTH),
    "DEFT": peft.DeftConfig(r=2, deft_dropout=0.4, **BOTH),
    "FRoD": peft.FrodConfig(frod_dropout=0.4, **BOTH),
    "GraLoRA": peft.GraloraConfig(r=2, hybrid_r=1, gralora_dropout=0.4, **BOTH),
    "HiRA": peft.HiraConfig(r=2, hira_dropout=0.4, **BOTH),
    "MiSS": peft.MissConfig(r=2, miss_dropout=0.4, **BOTH),
    "Poly": peft.PolyConfig(r=2, n_tasks=2, n_skills=3, **BOTH),
    "PSOFT": peft.PsoftConfig(r=4, psoft_dropout=0.4, **BOTH),
    "PVeRA": peft.PveraConfig(r=2, pvera_dropout=0.4, **BOTH),
    "RandLoRA": peft.RandLoraConfig(r=2, randlora_dropout=0.4, **BOTH),
    "SuperTuning": peft.SupertuningConfig(r=2, lora_alpha=4, lora_dropout=0.4, sparsity=0.8, **BOTH),
    "TinyLoRA": peft.TinyLoraConfig(r=2, tinylora_dropout=0.4, **BOTH),
    "UniLoRA": peft.UniLoraConfig(r=2, theta_d_length=20, unilora_dropout=0.4, **BOTH),
    "VBLoRA": peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, vblora_dropout=0.4, **BOTH),
}


class Layers(nn.Sequential):
    """Layers in a row; `peft` passes Poly's `task_ids` on to them, too."""

    def forward(self, input: torch.Tensor, task_ids: object = None) -> torch.Tensor:
        return super().forward(input)


def base() -> nn.Module:
    torch.manual_seed(0)
    return Layers(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_training_draws_as_in_peft(config: peft.PeftConfig, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(), copy.deepcopy(config))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(base(), tmp_path, inputs={"input": X})
    more = {"task_ids": torch.tensor([1, 0, 1])} if config.peft_type == "POLY" else {}
    found, wanted = (trained(m.train(), lambda m=m: m(X, **more).pow(2).mean()) for m in (ours, theirs.base_model))  # type: ignore[misc]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len(set(wanted)) == len(wanted)


def test_an_embedding_draws_as_in_peft(tmp_path: Path) -> None:
    """TinyLoRA has dropout there; of LoRA, HF PEFT leaves it out."""
    ids = torch.tensor([[1, 4, 2], [0, 3, 4]])
    bases = []
    for _ in range(2):
        torch.manual_seed(0)
        bases.append(nn.Sequential(nn.Embedding(5, 8), nn.Tanh(), nn.Linear(8, 4)))
    config = peft.TinyLoraConfig(r=2, tinylora_dropout=0.4, target_modules=["0", "2"])
    theirs = peft.get_peft_model(bases[0], config)
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(bases[1], tmp_path, inputs={"input": ids})
    found, wanted = (trained(m.train(), lambda m=m: m(ids).pow(2).mean()) for m in (ours, theirs.base_model))  # type: ignore[misc]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len(set(wanted)) == len(wanted)
