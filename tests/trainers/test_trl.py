"""TRL's trainers on an adapted model: the losses are those that they have with `peft`, step for step."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import adapt
from support.soft_cases import LSTM, MLP, PREFIX, PROJECTED, PROMPT_TUNING, Soft
from support.soft_cases import trained as trained_by
from support.zoo import ZOO
from torch import nn
from trainers.trl_runs import FIXED, PAIRS, TEXTS, Pairs, dpo, losses, peft_model, rows, sft, sft_trainer, tokenizer

import peftfx
from peftfx.errors import PeftfxError
from peftfx.model.trainers.refused import refuse_options

trl = pytest.importorskip("trl", reason="pip install trl")


class Choices(getattr(trl, "RewardTrainer")):  # type: ignore[misc]  # noqa: B009
    """Of pairs that are tokens already."""

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        return dataset


def scorer() -> nn.Module:
    """A reward model; equal calls give equal weights."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(vocab_size=99, num_labels=1, pad_token_id=0, **size))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter that `peft` made."""
    directory = tmp_path_factory.mktemp("adapter")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=4, **options))
    theirs.save_pretrained(str(directory))
    return directory


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


@pytest.mark.parametrize("soft", [PROMPT_TUNING, PREFIX], ids=range(2))
def test_dpo_of_a_soft_prompt(soft: Soft, tmp_path: Path) -> None:
    """The reference is the prompt as it was at the start, which `peft` copies."""
    theirs = soft.theirs("llama")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter")
    ours.load_adapter(tmp_path / "adapter", "ref")
    ours.set_adapter("default")
    got = dpo(ours, tmp_path, ours.reference("ref"), gradient_checkpointing=False)
    assert got == pytest.approx(dpo(theirs.train(), tmp_path, None, gradient_checkpointing=False), abs=1e-5)
    assert got[0] == pytest.approx(0.693147, abs=1e-5)
    assert len(set(got)) == len(got)


def test_dpo_with_the_base_as_reference(saved: Path, tmp_path: Path) -> None:
    ours = peftfx.load(ZOO["llama"].build(), saved)
    with pytest.warns(UserWarning, match="the base without the loaded adapter 'default'"):
        reference = ours.reference()
    got = dpo(ours, tmp_path, reference)
    assert got == pytest.approx(dpo(peft_model(saved), tmp_path, copy.deepcopy(ZOO["llama"].build())), abs=1e-5)


def test_a_reward_model(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(scorer(), config).save_pretrained(str(tmp_path / "adapter"))
    ours = peftfx.load(scorer(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(scorer(), str(tmp_path / "adapter"), is_trainable=True)
    columns = {name: PAIRS[name] for name in ("chosen_ids", "rejected_ids")}
    got, want = (
        losses(Choices(model, arguments, train_dataset=rows(columns), processing_class=tokenizer()))
        for model, arguments in ((m, trl.RewardConfig(str(tmp_path), **FIXED)) for m in (ours, theirs))
    )
    assert got == pytest.approx(want, abs=1e-5)
    assert len(set(got)) == len(got)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_is_resumed(kind: str, saved: Path, tmp_path: Path) -> None:
    seen = []
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        model = peftfx.load(ZOO["llama"].build(), saved)
        options = {**FIXED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        if kind == "sft":
            arguments = trl.SFTConfig(str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **options)
            given = {"train_dataset": rows(TEXTS), "processing_class": tokenizer()}
            trainer = trl.SFTTrainer(model, arguments, **given)
        else:
            model.load_adapter(saved, "ref")
            model.set_adapter("default")
            given = {"train_dataset": rows(PAIRS), "processing_class": tokenizer()}
            trainer = Pairs(model, model.reference("ref"), trl.DPOConfig(str(tmp_path), **options), **given)
        torch.manual_seed(0)
        trainer.train(resume_from_checkpoint=resumed)
        logged = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
        seen.append((logged, model.state_dict()))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-6)
    assert all(torch.allclose(seen[1][1][name], tensor, atol=1e-6) for name, tensor in seen[0][1].items())
    size = sum(t.numel() * t.element_size() for t in seen[0][1].values())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size < size + 8192


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft", "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("soft", [PROMPT_TUNING, MLP, LSTM, PREFIX, PROJECTED], ids=range(5))
def test_sft_of_a_soft_prompt(soft: Soft, options: dict[str, object], tmp_path: Path) -> None:
    """Losses, entropies and accuracies are `peft`'s: none is of a virtual token."""
    theirs = soft.theirs("llama")
    ours = soft.ours(theirs)
    kept = {"gradient_checkpointing": soft.method is not peftfx.PrefixTuning, **options}
    seen = []
    for model in (ours, theirs):
        trainer = sft_trainer(model.train(), tmp_path, eval_strategy="steps", eval_steps=2, **kept)
        losses(trainer)
        names = [f"{e}{name}" for name in ("loss", "entropy", "mean_token_accuracy") for e in ("", "eval_")]
        names += ["grad_norm", "num_tokens"]
        seen.append([{name: line[name] for name in names if name in line} for line in trainer.state.log_history])
    assert [len(line) for line in seen[0]] == [5, 5, 3, 5, 3, 0]
    for got, want in zip(*seen, strict=True):
        assert got == pytest.approx(want, abs=1e-5, rel=1e-4)
    for name, value in trained_by(theirs).items():
        torch.testing.assert_close(dict(ours.adapter("default").tensors())[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("soft", [MLP, PROJECTED], ids=range(2))
def test_a_prompt_is_computed_under_the_trainers_autocast(soft: Soft, tmp_path: Path) -> None:
    """In bfloat16 as `peft`'s, in TRL's trainer and in transformers' own."""
    seen = []
    for make in (soft.ours, copy.deepcopy):
        for own in (False, True):
            torch.manual_seed(0)
            model = make(soft.theirs("llama")).train()
            trainer = sft_trainer(model, tmp_path, gradient_checkpointing=False, bf16=True, max_steps=1)
            if own:
                collate, plain = trainer.data_collator, copy.deepcopy(model)
                plain.__dict__.pop("forward", None)
                arguments = hf.TrainingArguments(
                    str(tmp_path), remove_unused_columns=False, **{**FIXED, "bf16": True, "max_steps": 1}
                )
                trainer = hf.Trainer(plain, arguments, collate, rows(TEXTS))
            seen.append(losses(trainer))
    assert seen[:2] == seen[2:]


def test_sft_of_a_prompt_beside_a_lora(tmp_path: Path) -> None:
    """The losses are those of transformers' own trainer, which runs the model's own forward."""
    rules = [peftfx.PromptTuning(num_virtual_tokens=3), peftfx.LoRA(r=4, target="attention.query")]
    torch.manual_seed(0)
    adapted = adapt("llama", rules).train()
    plain = copy.deepcopy(adapted)
    got = sft(adapted, tmp_path, gradient_checkpointing=False)
    collate = sft_trainer(plain, tmp_path).data_collator
    plain.__dict__.pop("forward")
    arguments = hf.TrainingArguments(str(tmp_path), remove_unused_columns=False, **FIXED)
    assert got == pytest.approx(losses(hf.Trainer(plain, arguments, collate, rows(TEXTS))), abs=1e-5)


def test_sft_of_an_alora(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = peft.LoraConfig(r=4, alora_invocation_tokens=[4, 5], **options)
    peft.get_peft_model(ZOO["llama"].build(), config).save_pretrained(str(tmp_path / "adapter"))
    got = sft(peftfx.load(ZOO["llama"].build(), tmp_path / "adapter"), tmp_path)
    assert got == pytest.approx(sft(peft_model(tmp_path / "adapter"), tmp_path), abs=1e-5)


def test_a_forward_that_passes_adapters_by_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="does not run the model's own"):
        sft_trainer(adapt("llama", peftfx.LoRA(target_modules=["lm_head"])), tmp_path)
    for rule in (peftfx.PromptTuning(num_virtual_tokens=3), peftfx.LoRA(target_modules=["q_proj"])):
        with pytest.raises(PeftfxError, match=r'road="graph" was asked for(.|\n)*road="modules"'):
            sft_trainer(adapt("llama", rule, road="graph"), tmp_path)


@pytest.mark.parametrize("rule", [peftfx.PromptTuning(num_virtual_tokens=3), peftfx.PrefixTuning(num_virtual_tokens=3)])
def test_rows_of_several_texts_are_refused_under_a_soft_prompt(rule: object, tmp_path: Path) -> None:
    """Only the first text would see a prompt, and later texts would see the first behind a prefix, as in `peft`."""
    adapted, options = adapt("llama", rule), {"gradient_checkpointing": False, "max_length": None}
    with pytest.raises(PeftfxError, match=r"several texts(.|\n)*padding_free=False"):
        sft(adapted, tmp_path, padding_free=True, **options)
    adapted.__dict__.pop("forward")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with pytest.raises(PeftfxError, match="several texts"):
        adapted(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    adapted(input_ids=ids, position_ids=torch.tensor([[1, 1, 0, 1, 2]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_config_of_peft_for_an_adapted_model_is_refused(name: str, tmp_path: Path) -> None:
    ours = adapt("llama", peftfx.LoRA(r=4), name)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    with pytest.raises(PeftfxError, match=r"adapted by peftfx(.|\n)*leave peft_config out"):
        sft_trainer(ours, tmp_path, peft_config=config)
    sft(ours, tmp_path)


@pytest.mark.parametrize("rules", [peftfx.LoRA(r=4), [peftfx.LoRA(r=4), peftfx.IA3(target="mlp.down")]])
@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.AdaptionPromptConfig])
def test_peft_puts_no_prompt_around_an_adapted_model(config: type, rules: object) -> None:
    """Such configs do not ask for the model's own: until now it was wrapped, and its adapters were frozen."""
    ours = adapt("llama", rules)
    options = {"task_type": "CAUSAL_LM", **dict.fromkeys({"num_virtual_tokens", "adapter_layers", "adapter_len"}, 2)}
    known = {key: value for key, value in options.items() if key in inspect.signature(config).parameters}
    with pytest.raises(PeftfxError, match=r"adapted by peftfx(.|\n)*add_adapter"):
        peft.get_peft_model(ours, config(**known))
    assert all(p.requires_grad for p in ours.adapters.parameters())


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="CAUSAL_LM"),
        peft.LoraConfig(target_modules=["o_proj"]),
        peft.LoraConfig(target_modules="all-linear"),
        peft.IA3Config(task_type="CAUSAL_LM"),
        peft.LNTuningConfig(task_type="CAUSAL_LM"),
        peft.TrainableTokensConfig(token_indices=[1, 2]),
    ],
    ids=range(6),
)
def test_peft_adapts_nothing_beside_two_rules(config: object) -> None:
    """`peft` put layers into the base and froze the adapters, or ended in words of its own."""
    ours = adapt("llama", [peftfx.LoRA(r=4, target="attention.query"), peftfx.IA3(target="mlp.down")])
    with pytest.raises(PeftfxError, match=r"adapted by peftfx(.|\n)*add_adapter"):
        peft.get_peft_model(ours, copy.deepcopy(config))
    assert all(p.requires_grad for p in ours.adapters.parameters())
    assert not any("peft." in type(module).__module__ for module in ours.modules())


def test_dpo_switches_the_dropout_of_an_adapter_off(tmp_path: Path) -> None:
    """TRL does so by default (`disable_dropout`): it looks for dropout modules."""
    options = {"target_modules": ["q_proj"], "lora_dropout": 0.4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=4, **options)).save_pretrained(tmp_path / "adapter")
    ours = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the base without the loaded adapter"):
        got = dpo(ours, tmp_path, ours.reference())
    want = dpo(peft_model(tmp_path / "adapter"), tmp_path, copy.deepcopy(ZOO["llama"].build()))
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_a_reference_that_is_mixed_with_the_model_is_refused(reference: str, saved: Path, tmp_path: Path) -> None:
    """With a model of its own as reference, too, of which until then no parameter has changed."""
    ours = peftfx.load(ZOO["llama"].build(), saved)
    ours.load_adapter(saved, "ref")
    ours.set_adapter("default")
    held = ours.reference("ref") if reference == "adapter" else ZOO["llama"].build()
    before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    arguments = trl.DPOConfig(str(tmp_path), sync_ref_model=True, **FIXED)
    with pytest.raises(PeftfxError, match=r"sync_ref_model mixes(.|\n)*set_peft_model_state_dict"):  # before it trains
        Pairs(ours, held, arguments, train_dataset=rows(PAIRS), processing_class=tokenizer())
    with pytest.raises(PeftfxError, match="sync_ref_model mixes"):  # and where a callback mixes without that option
        getattr(trl, "SyncRefModelCallback").sync_target_model(ours, held, 0.5)  # noqa: B009
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.state_dict().items())
    peftfx.set_peft_model_state_dict(ours, peftfx.get_peft_model_state_dict(ours), "ref")
    own = dict(ours.adapter("default").tensors())
    assert all(torch.equal(tensor, own[name]) for name, tensor in ours.adapter("ref").tensors())


def test_a_prefix_is_refused_with_checkpoints_when_the_trainer_is_made(tmp_path: Path) -> None:
    """GRPO and RLOO would write texts first. TRL switches checkpoints on by default."""
    ours = adapt("llama", peftfx.PrefixTuning(num_virtual_tokens=3))
    with pytest.raises(PeftfxError, match=r"prefix does not work with gradient checkpointing(.|\n)*=False"):
        sft_trainer(ours, tmp_path)
    checkpointed = hf.TrainingArguments(str(tmp_path), gradient_checkpointing=True, use_cpu=True)
    refuse_options(adapt("llama", peftfx.PrefixTuning(num_virtual_tokens=3), road="graph"), checkpointed)


def test_a_reference_has_no_gradients_and_the_dropout_that_a_trainer_has_set() -> None:
    """DPO calls it under no_grad, and sets dropout modules before that; other code may not."""
    ours = adapt("llama", peftfx.LoRA(r=4, lora_dropout=0.9)).train()
    reference, ids = ours.reference("default"), torch.tensor([[3, 4, 5]])
    for module in ours.adapters.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    got = reference(input_ids=ids).logits
    assert not got.requires_grad
    torch.testing.assert_close(got, ours.eval()(input_ids=ids).logits.detach())
