"""Methods that act by the task of each row: HF PEFT's numbers by `task_ids`; each task merged, exported, served."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.adapters.adapter import Adapter
from peftfx.errors import PeftfxError
from peftfx.model.adapted import AdaptedModel
from peftfx.serving.onnx_model import OnnxModel
from peftfx.testing.models import Causal
from peftfx.testing.setup import stir

BASE = Causal((), layers=2, groups=2).build()
IDS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TASKS = torch.tensor([2, 0, 1, 2])
METHODS = {
    "POLY": (
        peft.PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj"]),
        peftfx.Poly(r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj"]),
    ),
    "MULTITASK_PROMPT_TUNING": (
        peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=3, num_ranks=2, tokenizer_name_or_path="none"
        ),
        peftfx.MultitaskPromptTuning(num_virtual_tokens=3, num_tasks=3, num_ranks=2),
    ),
}


def outputs(model: nn.Module, **beside: Tensor) -> Tensor:
    return model(**CALL, **beside).logits


def adapted_by(name: str) -> AdaptedModel:
    made = peftfx.transform(copy.deepcopy(BASE), METHODS[name][1], seed=1, inputs=CALL)
    stir(made.adapter("default"), 2)
    return made.eval()


@functools.cache
def poly() -> AdaptedModel:
    """One that no test changes."""
    return adapted_by("POLY")


def by_task(adapted: AdaptedModel) -> tuple[str, ...]:
    return adapted.split_tasks("default")


@pytest.mark.parametrize("name", METHODS)
def test_it_computes_trains_and_saves_as_hf_peft(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(BASE), METHODS[name][0])
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftfx.load(copy.deepcopy(BASE), tmp_path / "theirs", inputs=CALL)
    kept = outputs(ours.eval(), task_ids=TASKS)
    torch.testing.assert_close(kept, outputs(theirs.eval(), task_ids=TASKS), atol=1e-5, rtol=1e-5)
    grads = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)  # skills are drawn in training
        outputs(model, task_ids=TASKS).square().sum().backward()
        grads.append(sorted((p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None), key=len))
    for got, want in zip(*map(sorted, grads), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "ours").eval()
    torch.testing.assert_close(kept, outputs(read, task_ids=TASKS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_each_row_of_generated_text_has_its_task_as_in_hf_peft(beams: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=60, eos_token_id=59, initializer_range=0.4)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), METHODS["POLY"][0])
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    ours = peftfx.load(theirs.eval()).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    rows = TASKS.repeat_interleave(beams)  # `peft` wants one for each beam
    want = theirs.generate(input_ids=IDS, task_ids=rows, **options)
    assert ours.generate(input_ids=IDS, task_ids=TASKS, **options).equal(want)
    assert not ours.generate(input_ids=IDS, task_ids=TASKS.roll(1), **options).equal(want)


@pytest.mark.parametrize("name", METHODS)
def test_each_task_is_an_adapter_of_its_own(name: str) -> None:
    adapted = adapted_by(name)
    want = outputs(adapted, task_ids=TASKS)
    names = by_task(adapted)
    assert adapted.active == ("default",)
    for row, task in enumerate(TASKS.tolist()):
        adapted.set_adapter(names[task])
        torch.testing.assert_close(outputs(adapted)[row], want[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs(adapted, task_ids=TASKS * 0), outputs(adapted))  # as HF PEFT is called
    mine, one = (adapted.adapter(n) for n in ("default", names[0]))
    assert {t.data_ptr() for _, t in mine.tensors()} & {t.data_ptr() for _, t in one.tensors()}, "a copy"


def test_a_task_is_merged_exported_and_read_by_hf_peft(tmp_path: Path) -> None:
    adapted = adapted_by("POLY")
    want = outputs(adapted, task_ids=torch.ones(4, dtype=torch.long))
    adapted.set_adapter(by_task(adapted)[1])
    adapted.save_pretrained(tmp_path / "one", "default_1")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "one").eval()
    torch.testing.assert_close(outputs(read.base_model, task_ids=TASKS * 0), want, atol=1e-5, rtol=1e-5)
    adapted.export(tmp_path / "onnx", view="forward")  # verified in ONNX Runtime
    adapted.merge()
    torch.testing.assert_close(adapted.base(**CALL).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["POLY", pytest.param("MULTITASK_PROMPT_TUNING", marks=pytest.mark.slow)])
def test_tasks_are_rows_of_one_export(name: str, tmp_path: Path) -> None:
    adapted = adapted_by(name)
    want = outputs(adapted, task_ids=TASKS)
    adapted.export(tmp_path / "onnx", view="forward", batched=by_task(adapted), inputs=CALL)
    served = OnnxModel(tmp_path / "onnx")
    got = torch.as_tensor(served(**CALL, adapter_ids=TASKS)["logits"])
    torch.testing.assert_close(got[:, : want.shape[1]], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "the call has none"),
        (torch.tensor([0, 1, 2, 3]), "must be from 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), "must be from 0 to 2"),
        (torch.tensor([0, 1]), "2"),
        (torch.zeros(4), "not one whole number for each row"),
        (torch.zeros(4, 2, dtype=torch.long), "not one whole number for each row"),
        ("two", "not whole numbers"),
    ],
)
def test_a_wrong_task_is_refused(given: object, told: str) -> None:
    beside = {} if given is None else {"task_ids": given}
    with pytest.raises(PeftfxError, match=told):
        outputs(poly(), **beside)  # type: ignore[arg-type]


@pytest.mark.further
def test_trainer_generates_with_a_column_of_tasks(tmp_path: Path) -> None:
    """As HF PEFT's example of Poly has it: `task_ids` of a data collator, and `num_parameters` asked by `Trainer`."""
    base = ZOO["t5"].build()
    config = peft.PolyConfig(target_modules=["q"], r=2, n_tasks=3, n_skills=2, n_splits=2, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "start")
    random = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(3, 90, (6,), generator=random),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.randint(3, 90, (3,), generator=random),
            "task_ids": torch.tensor([i % 3]),
        }
        for i in range(6)
    ]
    seen = []
    for model in (theirs, peftfx.load(copy.deepcopy(base), tmp_path / "start")):
        arguments = hf.Seq2SeqTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=3,
            num_train_epochs=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            eval_strategy="epoch",
            logging_strategy="epoch",
            disable_tqdm=True,
            predict_with_generate=True,
            generation_max_length=3,
            remove_unused_columns=False,
        )
        given = {"train_dataset": rows, "eval_dataset": rows, "data_collator": hf.default_data_collator}
        trainer = hf.Seq2SeqTrainer(
            model=model, args=arguments, **given, compute_metrics=lambda p: {"written": float(p.predictions.sum())}
        )
        trainer.train()
        log = [(key, row[key]) for row in trainer.state.log_history for key in sorted(row)]
        seen.append([value for key, value in log if key in ("loss", "eval_loss", "eval_written")])
    assert len(seen[0]) == 3
    assert seen[1] == pytest.approx(seen[0], abs=2e-4)


def test_what_has_no_tasks_is_told() -> None:
    adapted = poly()
    with adapted.disable_adapter():
        torch.testing.assert_close(outputs(adapted, task_ids=TASKS), BASE(**CALL).logits)
    for act in (adapted.graph, adapted.merge):
        with pytest.raises(PeftfxError, match="split_tasks"):
            act()
    with pytest.raises(PeftfxError, match="pass task_ids="):
        adapted.generate(input_ids=IDS, max_new_tokens=2)
    plain = peftfx.transform(copy.deepcopy(BASE), peftfx.LoRA(r=2, target_modules=["q_proj"]), inputs=CALL)
    with pytest.raises(PeftfxError, match="the same for every task"):
        plain.split_tasks("default")


def test_checkpointed_layers_know_the_tasks() -> None:
    found = []
    for again in (False, True):
        adapted = adapted_by("POLY").train()
        if again:
            adapted.gradient_checkpointing_enable()
        torch.manual_seed(0)
        outputs(adapted, task_ids=TASKS).square().sum().backward()
        found.append(_gradients(adapted.adapter("default")))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def _gradients(adapter: Adapter) -> list[Tensor]:
    return [p.grad for p in adapter.parameters() if p.grad is not None]


@pytest.mark.slow
def test_a_prompt_starts_from_a_source_of_other_tasks(tmp_path: Path) -> None:
    source = adapted_by("MULTITASK_PROMPT_TUNING")
    source.save_pretrained(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    for how, task in (("EXACT_SOURCE_TASK", 1), ("AVERAGE_SOURCE_TASKS", 0), ("ONLY_SOURCE_SHARED", 0)):
        options = {"num_virtual_tokens": 3, "num_ranks": 2, "prompt_tuning_init": how, "prompt_tuning_init_task": task}
        options["prompt_tuning_init_state_dict_path"] = path
        ours = peftfx.transform(copy.deepcopy(BASE), peftfx.MultitaskPromptTuning(**options), inputs=CALL)
        config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path="none", **options)
        theirs = peft.get_peft_model(copy.deepcopy(BASE), config).prompt_encoder["default"]
        own = {name.rpartition(".")[2]: p for name, p in ours.adapter("default").named_parameters()}
        torch.testing.assert_close(own["prompt_embeddings"], theirs.embedding.weight)
        if how != "ONLY_SOURCE_SHARED":
            torch.testing.assert_close(own["prefix_task_cols"], theirs.prefix_task_cols)
            torch.testing.assert_close(own["prefix_task_rows"], theirs.prefix_task_rows)
    options |= {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 3}
    bad = peftfx.MultitaskPromptTuning(**options)
    with pytest.raises(PeftfxError, match="3 tasks"):
        peftfx.transform(copy.deepcopy(BASE), bad, inputs=CALL)
