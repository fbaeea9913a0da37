"""Trainers of TRL that load the base a second time, to compare with: a warning says how they take none."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.zoo import ZOO
from torch import nn
from trainers.trl_runs import FIXED, PAIRS, Pairs, losses, rows, tokenizer, trl

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.model.adapted import AdaptedModel

datasets = pytest.importorskip("datasets")
ONLINE = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and a random adapter of it that `peft` made."""
    directory = tmp_path_factory.mktemp("files")
    ZOO["llama"].build().save_pretrained(directory / "base")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    peft.get_peft_model(base(directory), peft.LoraConfig(r=4, **options)).save_pretrained(str(directory / "adapter"))
    return directory


def base(files: Path) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(files / "base")


def ours(files: Path) -> AdaptedModel:
    """With the adapter as it is at the start as `ref`, too."""
    model = peftfx.load(base(files), files / "adapter")
    model.load_adapter(files / "adapter", "ref")
    model.set_adapter("default")
    return model


def theirs(files: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(files), str(files / "adapter"), is_trainable=True)


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def online(kind: str, model: nn.Module, directory: Path, beta: float) -> hf.Trainer:
    arguments = getattr(trl, f"{kind}Config")(str(directory), beta=beta, **{**FIXED, **ONLINE})
    prompts = datasets.Dataset.from_dict({"prompt": ["a b c", "b c", "d e f a", "g"] * 2})
    given = {"train_dataset": prompts, "processing_class": tokenizer()}
    torch.manual_seed(0)
    return getattr(trl, f"{kind}Trainer")(model, reward, arguments, **given)


def logged(trainer: hf.Trainer) -> list[float]:
    losses(trainer)
    return [line[name] for line in trainer.state.log_history for name in ("loss", "kl", "grad_norm") if name in line]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_trainer_that_takes_no_reference_gets_one_after_it_is_made(kind: str, files: Path, tmp_path: Path) -> None:
    """The numbers are then those of `peft`, and no second base was loaded."""
    model = ours(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        trainer = online(kind, model, tmp_path, beta=0.0)
    trainer.beta, trainer.ref_model = 0.3, model.reference("ref")
    pytest.importorskip("trl.trainer.utils").add_fused_lm_head(trainer.ref_model, temperature=trainer.temperature)
    assert logged(trainer) == pytest.approx(logged(online(kind, theirs(files), tmp_path, beta=0.3)), abs=1e-5)
    with pytest.warns(PeftfxWarning, match=r"loads the base a second time(.|\n)*beta=0\.0"):
        online(kind, ours(files), tmp_path, beta=0.3)


def test_a_trainer_without_the_reference_that_it_takes_warns(files: Path, tmp_path: Path) -> None:
    given = {"train_dataset": rows(PAIRS), "processing_class": tokenizer()}
    with pytest.warns(PeftfxWarning, match=r"loads the base a second time, .* give ref_model= too"):
        Pairs(ours(files), None, trl.DPOConfig(str(tmp_path), **FIXED), **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        for reference in (ours(files).reference("ref"), base(files)):
            Pairs(ours(files), reference, trl.DPOConfig(str(tmp_path), **FIXED), **given)
        Pairs(ours(files), None, trl.DPOConfig(str(tmp_path), precompute_ref_log_probs=True, **FIXED), **given)


def test_a_teacher_is_the_base_without_a_second_copy(files: Path, tmp_path: Path) -> None:
    own = pytest.importorskip("trl.experimental.sdft")
    columns = {"prompt": ["a b c", "b c", "d e f a", "g"] * 2, "privileged_context": ["c b", "g", "a a b", "f"] * 2}

    def made(model: nn.Module, kind: str) -> hf.Trainer:
        options = {**FIXED, **ONLINE, "teacher_model_kind": kind, "distillation_topk": 20}
        given = {"train_dataset": datasets.Dataset.from_dict(columns), "processing_class": tokenizer()}
        torch.manual_seed(0)
        return own.SDFTTrainer(model, own.SDFTConfig(str(tmp_path), **options), **given)

    want = logged(made(theirs(files), "base"))
    model = peftfx.transform(theirs(files))
    trainer = made(model, "live")
    with pytest.warns(PeftfxWarning, match="the reference is the base without"):
        trainer.teacher_model = model.reference()
    assert logged(trainer) == pytest.approx(want, abs=1e-5)
    with pytest.warns(PeftfxWarning, match=r"loads the base a second time(.|\n)*'live'"):
        second = made(ours(files), "base")
    assert logged(second) == pytest.approx(want, abs=1e-5)
    with pytest.raises(PeftfxError, match=r"mixes the parameters of a whole model(.|\n)*'live' or 'base'"):
        made(ours(files), "ema")
