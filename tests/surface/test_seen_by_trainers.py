"""What trainers and torch.func ask of a model: the answers are those that HF PEFT's model leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from support.soft_cases import PREFIX
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers.trainer_pt_utils import LabelSmoother

import peftfx
from peftfx.errors import PeftfxError

IDS = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def llama(**sizes: int) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | sizes, num_attention_heads=2))


def t5() -> hf.T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))


def pair(base: Any, task: str = "CAUSAL_LM", **options: Any) -> tuple[nn.Module, peftfx.AdaptedModel]:
    """`peft`'s model with a random LoRA, and ours with the same."""
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, task_type=task, **options))
    randomise(theirs)
    ours = peftfx.transform(base(), peftfx.LoRA(r=2, target_modules=options["target_modules"]))
    peftfx.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def losses(model: nn.Module, directory: Path, rows: list[dict[str, Any]], **options: Any) -> list[float]:
    arguments = hf.TrainingArguments(
        output_dir=str(directory),
        max_steps=5,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    collator = hf.DataCollatorForSeq2Seq(_Words(), model=model) if "decoder_start_token_id" in options else None
    trainer = hf.Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class _Words:
    """As much of a tokenizer as a collator of rows of one length asks for."""

    padding_side, pad_token_id = "right", 0

    def pad(self, rows: list[dict[str, Any]], **_: Any) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("options", [{"weight_decay": 0.5}, {"label_smoothing_factor": 0.2}], ids=str)
def test_trainer_takes_the_same_steps(options: dict[str, float], tmp_path: Path) -> None:
    theirs, ours = pair(llama, target_modules=["q_proj", "down_proj"])
    want, got = (losses(model, tmp_path, ROWS, **options) for model in (theirs, ours))
    assert got == pytest.approx(want, abs=1e-5)
    saved, own = peft.get_peft_model_state_dict(theirs), peftfx.get_peft_model_state_dict(ours)
    assert all(torch.allclose(own[name], tensor, atol=1e-5) for name, tensor in saved.items())


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_weight_decay_reaches_each_tensor_of_an_adapter(road: str, tmp_path: Path) -> None:
    ours = peftfx.transform(llama(), peftfx.LoRA(r=2, target="all-linear"), road=road)
    arguments = hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.1)
    optimizer = hf.Trainer(ours, arguments).create_optimizer()
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(28, 0.1), (0, 0.0)]


def test_a_collator_makes_the_inputs_of_a_decoder() -> None:
    _, ours = pair(t5, "SEQ_2_SEQ_LM", target_modules=["q", "v"])
    collator = hf.DataCollatorForSeq2Seq(_Words(), model=ours)  # type: ignore[arg-type]
    batch = collator(ROWS[:2])
    assert torch.equal(batch["decoder_input_ids"], t5().prepare_decoder_input_ids_from_labels(batch["labels"]))
    with pytest.raises(AttributeError, match="call it before you adapt the model"):
        ours.resize_token_embeddings(50)


def test_a_quantised_base_is_trained_by_trainer(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def base() -> Any:
        return hf.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")

    theirs, ours = pair(base, target_modules=["q_proj", "down_proj"])
    want, got = (losses(model, tmp_path, ROWS) for model in (theirs, ours))
    assert got == pytest.approx(want, abs=1e-4)


def test_tensors_given_for_one_call_leave_the_adapter_as_it_is() -> None:
    theirs, ours = pair(llama, target_modules=["q_proj", "down_proj"])
    ours.eval()
    before = ours(input_ids=IDS).logits.detach()
    zeros = {n: torch.zeros_like(p) for n, p in ours.named_parameters() if p.requires_grad}
    torch.testing.assert_close(functional_call(ours, zeros, (), {"input_ids": IDS}).logits, llama().eval()(IDS).logits)
    assert torch.equal(ours(input_ids=IDS).logits, before)

    def loss(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, values, (), {"input_ids": IDS, "labels": IDS}).loss
        return found

    sums = []
    for model in (theirs.eval(), ours):
        values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        sums.append(sorted(float(g.abs().sum()) for g in grad(lambda v, m=model: loss(m, v))(values).values()))
    assert sums[1] == pytest.approx(sums[0], rel=1e-4)
    assert torch.equal(ours(input_ids=IDS).logits, before)


def test_an_adapter_of_two_rules_has_no_config_to_ask_for() -> None:
    rules = [peftfx.LoRA(r=2, target_modules=["q_proj"]), peftfx.IA3(target_modules=["down_proj"])]
    ours = peftfx.transform(llama(), rules)
    assert dict(ours.peft_config) == {}
    assert not hasattr(ours, "active_peft_config")
    for ask in (lambda: ours.peft_config["default"], lambda: ours.active_peft_config):
        with pytest.raises(PeftfxError, match="an adapter of 2 rules has a config for each"):
            ask()
    with pytest.raises(KeyError):
        _ = ours.peft_config["other"]
    ours.add_adapter("one", peftfx.LoRA(r=2))
    assert list(ours.peft_config) == ["one"]


def test_no_adapter_is_called_by_the_name_for_none() -> None:
    ours = peftfx.transform(llama(), peftfx.LoRA(r=2))
    with pytest.raises(PeftfxError, match="in adapter_names it means no adapter"):
        ours.add_adapter("__base__", peftfx.LoRA(r=2))


def test_an_adapter_is_made_active_without_being_trained() -> None:
    ours = peftfx.transform(llama(), peftfx.LoRA(r=2))
    ours.add_adapter("second", peftfx.LoRA(r=2))
    ours.set_adapter(adapter_name="default", inference_mode=True)
    assert (ours.active_adapter, [p for p in ours.parameters() if p.requires_grad]) == ("default", [])
    ours.set_adapter("default")
    assert {n.split(".")[1] for n, p in ours.named_parameters() if p.requires_grad} == {"default"}


def test_labels_that_a_trainer_smooths_are_shifted(tmp_path: Path) -> None:
    """Of a soft prompt in peft, `Trainer` asks the model within: LLaMA's labels are not shifted."""
    theirs = PREFIX.theirs("llama")
    ours = PREFIX.ours(theirs)
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    arguments = hf.TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    got = hf.Trainer(ours, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    with torch.no_grad():
        want = LabelSmoother(0.1)(theirs(input_ids=ids), ids, shift_labels=True)
    assert got == pytest.approx(float(want), abs=1e-5)


def test_what_save_model_writes_is_told_from_an_adapter_and_can_be_made_one(tmp_path: Path) -> None:
    ours = peftfx.transform(llama(), peftfx.LoRA(r=2))
    with torch.no_grad():
        for p in ours.adapters.parameters():
            p.add_(torch.randn_like(p))
    trainer = hf.Trainer(ours, hf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    trainer.save_model(str(tmp_path / "run"))
    with pytest.raises(PeftfxError, match=r"no adapter_config(.|\n)*what Trainer saves"):
        peftfx.load(llama(), tmp_path / "run")
    again = peftfx.transform(llama(), peftfx.LoRA(r=2))
    again.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    again.save_pretrained(tmp_path / "run")
    assert torch.equal(
        peftfx.load(llama(), tmp_path / "run").eval()(input_ids=IDS).logits, ours.eval()(input_ids=IDS).logits
    )
