"""TRL's trainers on an adapted model: the losses are those that they have with `peft`, step for step."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import adapt
from support.zoo import ZOO
from tokenizers import Tokenizer, models
from torch import nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning

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
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def losses(trainer: hf.Trainer) -> list[float]:
    torch.manual_seed(0)
    trainer.train()
    return [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


def sft(model: nn.Module, directory: Path, **options: object) -> list[float]:
    arguments = trl.SFTConfig(str(directory), dataset_kwargs={"skip_prepare_dataset": True}, **{**FIXED, **options})
    return losses(trl.SFTTrainer(model, arguments, train_dataset=rows(TEXTS), processing_class=tokenizer()))


class Pairs(getattr(trl, "DPOTrainer")):  # type: ignore[misc]  # noqa: B009
    """Of pairs that are tokens already."""

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        return dataset


def dpo(model: nn.Module, directory: Path, reference: nn.Module | None) -> list[float]:
    arguments = trl.DPOConfig(str(directory), **FIXED)
    given = {"train_dataset": rows(PAIRS), "processing_class": tokenizer()}
    return losses(Pairs(model, reference, arguments, **given))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter that `peft` made."""
    directory = tmp_path_factory.mktemp("adapter")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=4, **options))
    theirs.save_pretrained(str(directory))
    return directory


def peft_model(saved: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(saved), is_trainable=True)


def test_sft_under_its_defaults(saved: Path, tmp_path: Path) -> None:
    ours = peftfx.load(ZOO["llama"].build(), saved)
    got = sft(ours, tmp_path)
    assert got == pytest.approx(sft(peft_model(saved), tmp_path), abs=1e-5)
    assert "sft" in ours.base.model_tags
    for kept in (False, True):
        plain = peftfx.load(ZOO["llama"].build(), saved)
        assert sft(plain, tmp_path, gradient_checkpointing=kept) == pytest.approx(got, abs=1e-5)


def test_dpo_with_a_reference_adapter(saved: Path, tmp_path: Path) -> None:
    ours = peftfx.load(ZOO["llama"].build(), saved)
    ours.load_adapter(saved, "ref")
    ours.set_adapter("default")
    got = dpo(ours, tmp_path, ours.reference("ref"))
    assert got == pytest.approx(dpo(peft_model(saved), tmp_path, None), abs=1e-5)
    assert ours.active == ("default",)


def test_dpo_with_the_base_as_reference(saved: Path, tmp_path: Path) -> None:
    ours = peftfx.load(ZOO["llama"].build(), saved)
    got = dpo(ours, tmp_path, ours.reference())
    assert got == pytest.approx(dpo(peft_model(saved), tmp_path, copy.deepcopy(ZOO["llama"].build())), abs=1e-5)


@pytest.mark.parametrize("rule", [peftfx.LoRA(target_modules=["lm_head"]), peftfx.PromptTuning(num_virtual_tokens=3)])
def test_a_forward_that_passes_adapters_by_is_refused(rule: object, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="does not run the model's own"):
        sft(adapt("llama", rule), tmp_path)


def test_a_reference_tells_of_dropout() -> None:
    with pytest.warns(PeftfxWarning, match="lora_dropout"):
        adapt("llama", peftfx.LoRA(lora_dropout=0.1)).reference()
