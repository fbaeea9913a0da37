"""What `peft` writes is read, whatever its keys: the outputs are those of `peft`'s own forward, both ways."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.adapter_files import first, load_peft, same
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn

import peftfx


def distilbert() -> nn.Module:
    """A classifier whose two last layers are `pre_classifier` and `classifier`."""
    torch.manual_seed(0)
    sizes = {**TOKENS, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, num_labels=3)).eval()


def tokens(batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(batch))}


class TestModulesToSave:
    """`classifier` names every module whose path ends so: DistilBERT's `pre_classifier` is one."""

    @pytest.mark.parametrize("task", [None, "SEQ_CLS"])
    def test_a_distilbert_classifier_crosses_both_ways(self, task: str | None, tmp_path: Path) -> None:
        base, inputs = distilbert(), tokens()
        saved = None if task else ["classifier"]
        config = peft.LoraConfig(task_type=task, r=4, target_modules=["q_lin", "v_lin"], modules_to_save=saved)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        ours = peftfx.load(base, tmp_path / "theirs")
        same(first(ours, inputs), first(theirs, inputs))
        ours.save_pretrained(tmp_path / "ours")
        same(first(load_peft(copy.deepcopy(base), tmp_path / "ours"), inputs), first(theirs, inputs))
        ours.merge()
        same(first(ours.remove(), inputs), first(theirs, inputs))

    def test_names_of_heads_that_the_model_does_not_have_are_passed_over(self, tmp_path: Path) -> None:
        entry = ZOO["llama"]
        base, inputs = entry.build(), entry.inputs(3, 5)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier", "score"])
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path)
        same(first(peftfx.load(base, tmp_path), inputs), first(theirs, inputs))
