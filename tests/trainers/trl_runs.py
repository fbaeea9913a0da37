"""Runs of TRL's trainers on a few texts and pairs of tokens."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.words import word_tokenizer
from support.zoo import ZOO
from torch import nn

trl = pytest.importorskip("trl", reason="pip install trl")
datasets = pytest.importorskip("datasets")

FIXED = {
    "max_steps": 3,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "save_strategy": "no",
}
TEXTS = {"input_ids": [[3, 4, 5, 6, 7], [4, 5, 6, 3], [7, 8, 9, 10, 11, 12], [3, 3, 4]] * 2}
PAIRS = {
    "prompt_ids": [[3, 4, 5], [6, 7], [3, 9], [8, 8]] * 2,
    "chosen_ids": [[6, 7, 1], [4, 5, 6, 1], [7, 1], [3, 1]] * 2,
    "rejected_ids": [[9, 1], [10, 11, 1], [3, 3, 1], [4, 5, 6, 1]] * 2,
}


def rows(columns: dict[str, list[list[int]]]) -> object:
    """A data set of tokens; the fingerprint is given, for `datasets` would pickle what is around to make one."""
    return datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="rows")


def tokenizer() -> hf.PreTrainedTokenizerBase:
    words = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]
    return word_tokenizer(words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def losses(trainer: hf.Trainer) -> list[float]:
    torch.manual_seed(0)
    trainer.train()
    return [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


def sft_trainer(model: nn.Module, directory: Path, peft_config: object | None = None, **options: object) -> hf.Trainer:
    arguments = trl.SFTConfig(str(directory), dataset_kwargs={"skip_prepare_dataset": True}, **{**FIXED, **options})
    given = {"train_dataset": rows(TEXTS), "eval_dataset": rows(TEXTS), "processing_class": tokenizer()}
    return trl.SFTTrainer(model, arguments, peft_config=peft_config, **given)


def sft(model: nn.Module, directory: Path, **options: object) -> list[float]:
    return losses(sft_trainer(model, directory, **options))


class Pairs(getattr(trl, "DPOTrainer")):  # type: ignore[misc]  # noqa: B009
    """Of pairs that are tokens already."""

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        return dataset


def dpo(model: nn.Module, directory: Path, reference: nn.Module | None, **options: object) -> list[float]:
    arguments = trl.DPOConfig(str(directory), **{**FIXED, **options})
    given = {"train_dataset": rows(PAIRS), "processing_class": tokenizer()}
    return losses(Pairs(model, reference, arguments, **given))


def peft_model(saved: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(saved), is_trainable=True)
