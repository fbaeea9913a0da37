"""`transformers.Trainer` trains an AdaptedModel: the adapter alone is saved, resumed and loaded as the best model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn
from transformers.utils.generic import find_labels

import peftfx
from peftfx.methods.lora import LoRA
from peftfx.model.adapted import AdaptedModel
from peftfx.model.trainers.callbacks import peak_memory

Row = dict[str, object]
RATE, STEPS, BATCH = 0.02, 10, 4


def classifier(dropout: float = 0.0) -> nn.Module:
    """A one-layer BERT classifier; equal calls give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.BertConfig(
            **TOKENS,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        return hf.BertForSequenceClassification(config)


def adapted(dropout: float = 0.0) -> AdaptedModel:
    """Of an untrained adapter and a fresh head; equal calls give equal weights."""
    return peftfx.transform(
        classifier(dropout), LoRA(r=4, lora_dropout=dropout, modules_to_save=["classifier"]), seed=1
    )


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Sentences whose label is told by their first token; `text` is no input of the model."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 99, (5 * BATCH, 6), generator=random)
    ids[:, 0] = 5 + torch.arange(len(ids)) % 3
    return [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(row[0]) - 5, "text": "a b"}
        for row in ids
    ]


def arguments(directory: Path, **options: object) -> hf.TrainingArguments:
    fixed = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    return hf.TrainingArguments(output_dir=str(directory), **{**fixed, **options})


def losses(trainer: hf.Trainer, key: str = "loss") -> list[float]:
    return [float(line[key]) for line in trainer.state.log_history if key in line]


def batches(rows: Sequence[Row]) -> list[dict[str, Tensor]]:
    """The batches of a run, in its order, without what is no input of the model."""
    order = [i % len(rows) for i in range(STEPS * BATCH)]
    groups = [[rows[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
    names = ("input_ids", "attention_mask", "labels")
    return [{n: torch.stack([torch.as_tensor(row[n]) for row in group]) for n in names} for group in groups]


def loop(model: nn.Module, rows: Sequence[Row]) -> list[float]:
    """A plain training loop; the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    seen = []
    model.train()
    for batch in batches(rows):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


class TestRun:
    """One run with dropout, saved halfway and at the end."""

    @pytest.fixture(scope="class")
    @staticmethod
    def run(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> hf.Trainer:
        directory = tmp_path_factory.mktemp("run")
        options = arguments(directory, learning_rate=0.1, save_strategy="steps", save_steps=STEPS // 2)
        data = {"train_dataset": rows, "eval_dataset": rows}
        trainer = hf.Trainer(adapted(dropout=0.2), options, callbacks=[peftfx.AdapterInCheckpoints()], **data)
        trainer.train()
        return trainer

    def test_the_loss_falls(self, run: hf.Trainer) -> None:
        seen = losses(run)
        assert len(seen) == STEPS
        assert sum(seen[-3:]) < 0.9 * sum(seen[:3])

    def test_save_model_writes_the_adapter_alone(self, run: hf.Trainer, tmp_path: Path) -> None:
        run.save_model(str(tmp_path))
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == {f"adapters.{name}" for name, _ in run.model.adapters.named_parameters()}
        assert all(torch.equal(saved[name], tensor) for name, tensor in run.model.state_dict().items())
        trained, total = run.model.get_nb_trainable_parameters()
        assert sum(t.numel() for t in saved.values()) == trained < total / 10
        assert (tmp_path / "model.safetensors").stat().st_size < 4 * trained + 4096
        fresh = adapted()
        fresh.load_state_dict(saved)
        batch = ZOO["bert"].inputs(model=fresh.base)
        assert torch.equal(fresh.eval()(**batch).logits, run.model.eval()(**batch).logits)

    def test_a_checkpoint_is_an_adapter_by_the_callback(self, run: hf.Trainer) -> None:
        folder = Path(run.args.output_dir) / f"checkpoint-{STEPS}"
        assert (folder / "model.safetensors").is_file()
        batch = ZOO["bert"].inputs(model=run.model.base)
        want = run.model.eval()(**batch).logits
        assert peftfx.load(classifier(), folder).eval()(**batch).logits.equal(want)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(classifier(), folder).eval()(**batch).logits, want)

    def test_resumed_it_goes_on_exactly(self, run: hf.Trainer, rows: list[Row]) -> None:
        directory = Path(run.args.output_dir)
        again = hf.Trainer(adapted(dropout=0.2), copy.copy(run.args), train_dataset=rows)
        again.train(resume_from_checkpoint=str(directory / f"checkpoint-{STEPS // 2}"))
        assert losses(again)[STEPS // 2 :] == losses(run)[STEPS // 2 :]
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name

    def test_evaluation_is_without_dropout_and_finds_the_labels(self, run: hf.Trainer) -> None:
        first, second = run.evaluate()["eval_loss"], run.evaluate()["eval_loss"]
        assert first == second
        assert run.label_names == ["labels"]
        predicted = run.predict(run.eval_dataset)
        assert predicted.predictions.shape == (len(run.eval_dataset), 3)
        assert list(predicted.label_ids) == [row["labels"] for row in run.eval_dataset]


def test_the_best_adapter_is_loaded_at_the_end(rows: list[Row], tmp_path: Path) -> None:
    options = arguments(
        tmp_path,
        learning_rate=0.8,  # so large that later steps are worse
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        max_steps=5,
    )
    trainer = hf.Trainer(adapted(), options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    seen = losses(trainer, "eval_loss")
    best = seen.index(min(seen)) + 1
    assert best < len(seen)
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    state = trainer.model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen))


def test_it_is_the_plain_loop_step_by_step(rows: list[Row], tmp_path: Path) -> None:
    trainer = hf.Trainer(adapted(), arguments(tmp_path), train_dataset=rows)
    trainer.train()
    plain = adapted()
    assert losses(trainer) == pytest.approx(loop(plain, rows), abs=1e-4)  # Trainer logs four digits
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_columns_that_are_no_input_are_dropped_by_the_signature(rows: list[Row], tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def collate(group: list[Row]) -> dict[str, Tensor]:
        seen.extend(set(row) for row in group)
        return hf.default_data_collator(group)

    trainer = hf.Trainer(adapted(), arguments(tmp_path, max_steps=1), data_collator=collate, train_dataset=rows)
    trainer.train()
    assert set(rows[0]) - set.union(*seen) == {"text"}


def test_small_steps_that_accumulate_are_one_large_step(rows: list[Row], tmp_path: Path) -> None:
    """`Trainer` passes `num_items_in_batch`, by which a language model divides its loss."""
    texts = [{**row, "labels": row["input_ids"]} for row in rows]
    trainers = []
    for accumulated in (1, 2):
        options = arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=BATCH // accumulated,
            gradient_accumulation_steps=accumulated,
        )
        model = peftfx.transform(ZOO["llama"].build(), LoRA(), seed=1)
        trainers.append(hf.Trainer(model, options, train_dataset=texts))
        trainers[-1].train()
    large, small = trainers
    assert losses(small) == pytest.approx(losses(large), abs=1e-4)
    for name, tensor in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_answers_to_questions_are_labels_too() -> None:
    question = peftfx.transform(ZOO["distilbert"].build(), LoRA())
    assert find_labels(type(question)) == ["start_positions", "end_positions"]


def test_ten_steps_are_those_of_peft(rows: list[Row], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"], init_lora_weights=False)
    torch.manual_seed(0)  # Adam divides by tiny gradients: with some adapters the rounding of ten steps is larger
    theirs = peft.get_peft_model(classifier(), config)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(classifier(), tmp_path)
    for seen, want in zip(loop(ours, rows), loop(theirs, rows), strict=True):
        assert seen == pytest.approx(want, rel=1e-5)
    compared = 0
    for name, tensor in theirs.named_parameters():
        if tensor.requires_grad:
            path = name.removeprefix("base_model.model.").replace(".default.weight", "")
            got = ours.adapter("default").get(path)
            torch.testing.assert_close(got, tensor, rtol=1e-5, atol=1e-5 * float(tensor.detach().abs().max()))
            compared += 1
    assert compared == len(list(ours.adapters.parameters())) > 8


def test_memory_is_logged_and_printed_beside_the_loss(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    trainer = hf.Trainer(
        adapted(), arguments(tmp_path, **options), train_dataset=rows, callbacks=[peftfx.MemoryInLogs()]
    )
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(printed) == 2
    assert all("'peak_memory_gb'" in line for line in printed)
    assert 0 < peak_memory() < 64


def test_checkpointed_layers_train_alike_and_a_checkpoint_has_the_adapters_size(
    rows: list[Row], tmp_path: Path
) -> None:
    texts = [{**row, "labels": row["input_ids"]} for row in rows]
    seen, at = {}, tmp_path / "kept" / "checkpoint-2"
    for name, options in {
        "plain": {},
        "kept": {"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2},
        "resumed": {"gradient_checkpointing": True},
    }.items():
        model = peftfx.transform(ZOO["llama"].build(), LoRA(), seed=1)
        trainer = hf.Trainer(model, arguments(tmp_path / name, max_steps=4, **options), train_dataset=texts)
        trainer.train(resume_from_checkpoint=str(at) if name == "resumed" else None)
        seen[name] = losses(trainer)
        assert model.base.is_gradient_checkpointing == (name != "plain")
    assert seen["kept"] == pytest.approx(seen["plain"], abs=1e-4)
    assert seen["resumed"][2:] == seen["kept"][2:]
    adapter = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    sizes = {file.name: file.stat().st_size for file in at.iterdir()}
    assert sizes["model.safetensors"] < adapter + 8192
    assert sizes["optimizer.pt"] < 2 * adapter + 65536  # two moments, and an entry for each tensor
    rest = {name: size for name, size in sizes.items() if name not in ("model.safetensors", "optimizer.pt")}
    assert sum(rest.values()) < 65536, rest


def test_a_graph_is_checkpointed_by_trainer(rows: list[Row], tmp_path: Path) -> None:
    texts = [{**row, "labels": row["input_ids"]} for row in rows]
    model = peftfx.transform(ZOO["llama"].build(), LoRA(), road="graph", seed=1)
    seen = []
    for kept in (False, True):
        options = {"max_steps": 2, "learning_rate": 0.0, "gradient_checkpointing": kept}
        trainer = hf.Trainer(model, arguments(tmp_path, **options), train_dataset=texts)
        trainer.train()
        seen.append(losses(trainer))
        assert [bool(runs.pieces) for _, runs in model.graphs.runs._pieces.values()] == [True] * kept
    assert seen[0] == seen[1]
