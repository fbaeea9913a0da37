"""AdaLoRA's budget of ranks, step by step against `peft`'s: the same masks, the same adapter, the same files."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from support.adapter_files import load_peft, same
from support.parity import outputs
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import AdaLoRA, PeftfxError, RankAllocation
from peftfx.contract.common.rank_allocation import KEPT
from peftfx.model.adapted import AdaptedModel

STEPS = 14
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS, "deltaT": 2, "lora_alpha": 4}


def batches(model: str, base: nn.Module) -> list[dict[str, Tensor]]:
    return [ZOO[model].inputs(3, 6, seed, model=base, labels=True) for seed in range(STEPS)]


def pair(
    model: str, kind: str, target: list[str], directory: Path, **options: object
) -> tuple[AdaptedModel, nn.Module]:
    """The same adapter, at random values, here and in `peft`."""
    base = ZOO[model].build()
    config = peft.AdaLoraConfig(task_type=kind, target_modules=target, **{**SCHEDULE, **options})
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    theirs.save_pretrained(str(directory))
    return peftfx.load(base, directory), theirs


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], allocate: object) -> float:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    allocate()
    return loss.item()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by names that both sides have."""
    named = ((n.replace("base_model.model.", "").replace(".default", ""), p) for n, p in model.named_parameters())
    return {name.replace("adapters.", ""): p.detach() for name, p in named if p.requires_grad}


def assert_same_adapter(ours: AdaptedModel, theirs: nn.Module) -> None:
    got, want = trained(ours), trained(theirs)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()), msg=name)


def kept(ours: AdaptedModel) -> dict[str, list[bool]] | None:
    """The masks, by HF PEFT's names."""
    adapter = ours.adapter("default")
    found = {p.site.path: adapter.all_of(p).get(KEPT) for p in adapter.placements}
    return {f"{n}.lora_E": t.tolist() for n, t in found.items()} if None not in found.values() else None


@pytest.mark.parametrize(
    ("model", "kind", "target"),
    [
        ("llama", "CAUSAL_LM", ["q_proj", "v_proj", "down_proj"]),
        pytest.param("bert", "FEATURE_EXTRACTION", ["query", "value", "dense"], marks=pytest.mark.slow),
        pytest.param("t5", "SEQ_2_SEQ_LM", ["q", "v", "wo"], marks=pytest.mark.slow),
    ],
)
def test_a_whole_schedule_is_that_of_peft(model: str, kind: str, target: list[str], tmp_path: Path) -> None:
    ours, theirs = pair(model, kind, target, tmp_path / "start")
    models = (ours, theirs.base_model)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    config, masks = theirs.peft_config["default"], []
    for at, batch in enumerate(batches(model, ours.base)):
        allocate = [lambda m=m, at=at: m.update_and_allocate(at) for m in models]
        got, want = (step(m, o, batch, a) for m, o, a in zip(models, optimizers, allocate, strict=True))
        assert got == pytest.approx(want, rel=1e-5), at
        named = config.rank_pattern and {n.replace(".default", ""): m for n, m in config.rank_pattern.items()}
        assert kept(ours) == named, at
        masks.append(named and sum(map(sum, named.values())))
        assert_same_adapter(ours, theirs)
    places = len(ours.adapter("default").placements)
    assert masks[:4] == [None] * 4
    assert masks[4] < 4 * places
    assert masks[4:] == sorted(masks[4:], reverse=True)
    assert masks[-4:] == [2 * places] * 4
    assert not [n for n in ours.state_dict() if n.endswith(("importance", "uncertainty"))]

    ours.eval().save_pretrained(tmp_path / "ours")
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    mine, given = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in given.items()}
    pattern = [peft.PeftConfig.from_pretrained(str(tmp_path / d)).rank_pattern for d in ("ours", "theirs")]
    assert pattern[0] == pattern[1]

    inputs = ZOO[model].inputs(1, 5, 4, model=ours.base)
    want = logits(theirs.base_model, inputs)
    same(logits(ours, inputs), want)
    for loaded in (load_peft(ZOO[model].build(), tmp_path / d).base_model for d in ("ours", "theirs")):
        same(logits(loaded, inputs), want)
    again = peftfx.load(ZOO[model].build(), tmp_path / "theirs")
    same(logits(again, inputs), want)
    again.save_pretrained(tmp_path / "again")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "again")).rank_pattern == pattern[0]
    again.merge()
    same(logits(again.remove(), inputs), want)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return outputs(model.eval(), inputs)["logits"]


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(4, 99, (40, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(directory: Path, steps: int, **options: object) -> hf.Trainer:
    rule = AdaLoRA(init_lora_weights=False, target="attention.query | mlp.down", **SCHEDULE)
    model = peftfx.transform(ZOO["llama"].build(), rule, seed=1)
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.02}
    fixed |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "per_device_train_batch_size": 4}
    arguments = hf.TrainingArguments(output_dir=str(directory), max_steps=steps, **{**fixed, **options})
    return hf.Trainer(model, arguments, train_dataset=rows(), callbacks=[RankAllocation()])


def test_trainer_allocates_by_the_callback_and_resumed_goes_on_exactly(tmp_path: Path) -> None:
    whole = trainer(tmp_path, STEPS, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    assert sum(map(sum, kept(whole.model).values())) == 2 * len(whole.model.adapter("default").placements)
    resumed = trainer(tmp_path, STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert kept(resumed.model) == kept(whole.model)
    state = resumed.model.state_dict()
    assert state.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.model.state_dict().items())


def spent(model: str, **options: object) -> AdaptedModel:
    """An adapter whose budget is spent: two thirds of its ranks are gone."""
    rule = AdaLoRA(init_lora_weights=False, init_r=3, target_r=1, total_step=2, tfinal=1, **options)
    ours = peftfx.transform(ZOO[model].build(), rule, seed=0)
    for at in range(2):
        ours(**ZOO[model].inputs(2, 5, at, model=ours.base, labels=True)).loss.backward()
        ours.update_and_allocate(at)
    return ours


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "bloom"])
def test_what_is_left_of_parts_of_fused_weights_is_saved_for_peft(name: str, tmp_path: Path) -> None:
    ours = spent(name, target="attention.query | attention.value | mlp.down")
    ranks = {
        sum(p.method.written(ours.adapter("default").all_of(p))[0].left) for p in ours.adapter("default").placements
    }
    assert len(ranks) > 1
    inputs = ZOO[name].inputs(2, 6, 1, model=ours.base)
    want = logits(ours, inputs)
    ours.save_pretrained(tmp_path)
    for loaded in (load_peft(ZOO[name].build(), tmp_path).base_model, peftfx.load(ZOO[name].build(), tmp_path)):
        same(logits(loaded, inputs), want)


def test_a_module_without_a_rank_left_is_the_bases_own(tmp_path: Path) -> None:
    gone = {f"model.layers.0.self_attn.{name}_proj.lora_E": (False, False) for name in "qv"}
    rule = AdaLoRA(init_r=2, init_lora_weights=False, rank_pattern=gone)
    ours = peftfx.transform(ZOO["llama"].build(), rule, seed=0)
    inputs = ZOO["llama"].inputs(2, 6, 1, model=ours.base)
    want = logits(ours, inputs)
    ours.export(tmp_path / "onnx", merge=False, view="forward")
    ours.save_pretrained(tmp_path / "saved")
    same(logits(load_peft(ZOO["llama"].build(), tmp_path / "saved").base_model, inputs), want)
    served = peftfx.export.OnnxModel(tmp_path / "onnx")(**inputs)["logits"]
    torch.testing.assert_close(served, want, rtol=1e-4, atol=1e-4)
    ours(**ZOO["llama"].inputs(model=ours.base, labels=True)).loss.backward()


def test_its_own_loss_is_added_wherever_there_is_a_loss() -> None:
    plain, held = (
        peftfx.transform(ZOO["llama"].build(), AdaLoRA(init_r=2, orth_reg_weight=w), seed=0) for w in (0, 2.0)
    )
    inputs = ZOO["llama"].inputs(model=plain.base, labels=True)
    added = held(**inputs).loss - plain(**inputs).loss
    matrices = [p for n, p in held.adapters.named_parameters() if not n.endswith("lora_E")]
    want = torch.stack([((p @ p.T if len(p) == 2 else p.T @ p) - torch.eye(2)).norm() for p in matrices]).mean()
    torch.testing.assert_close(added, 2 * want)
    with held.disable_adapter():
        assert held(**inputs).loss == plain(**inputs).loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_r": 0}, "1 or more"),
        ({"beta1": 1.0}, "between 0 and 1"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "no steps"),
        ({"rank_pattern": {"layers.0.q_proj.lora_E": [True]}}, "each rank"),
        ({"lora_alpha": 0}, "above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PeftfxError, match=message):
        AdaLoRA(**options)


def test_a_budget_needs_a_schedule_gradients_and_every_step() -> None:
    llama = ZOO["llama"].build()
    for rule, message in (
        (peftfx.LoRA(), "changes none of the active adapters"),
        (AdaLoRA(), "needs the number of steps"),
        (AdaLoRA(**SCHEDULE), "gradient"),
    ):
        ours = peftfx.transform(llama, rule)
        with pytest.raises(PeftfxError, match=message):
            ours.update_and_allocate(0)
        ours.remove()
    ours = peftfx.transform(llama, AdaLoRA(**SCHEDULE))
    with pytest.raises(PeftfxError, match="has measured yet which ranks"):
        ours.update_and_allocate(STEPS - 3)
