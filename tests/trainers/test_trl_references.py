"""Results of a reference that TRL keeps in files are taken again for an equal reference, and for no other."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.zoo import ZOO
from torch import nn
from trainers.trl_runs import FIXED, PAIRS, Pairs, losses, peft_model, tokenizer, trl

import peftfx
from peftfx.errors import PeftfxWarning

datasets = pytest.importorskip("datasets")
hash_module = pytest.importorskip("trl.trainer.utils").hash_module

LABELLED = {
    "prompt_ids": PAIRS["prompt_ids"] * 2,
    "completion_ids": PAIRS["chosen_ids"] + PAIRS["rejected_ids"],
    "KL_completion_ids": PAIRS["rejected_ids"] + PAIRS["chosen_ids"],
    "label": [True] * 8 + [False] * 8,
}


class Labels(getattr(trl, "KTOTrainer")):  # type: ignore[misc]  # noqa: B009
    """Of answers that are tokens already."""

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        return dataset


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random adapters that `peft` made, of the same places."""
    directory = tmp_path_factory.mktemp("adapters")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=4, **options))
        theirs.save_pretrained(str(directory / name))
    return {name: directory / name for name in ("one", "other")}


def run(kind: str, model: nn.Module, reference: nn.Module | None, directory: Path) -> tuple[list[float], int]:
    """The losses of a trainer that computes the reference's results first, and how many files of results there are."""
    columns = PAIRS if kind == "dpo" else LABELLED
    if not (directory / "data").exists():
        datasets.Dataset.from_dict(columns).save_to_disk(str(directory / "data"))  # results are kept beside the rows
    options = {"precompute_ref_log_probs": True, **FIXED}
    trainer, config = (Pairs, trl.DPOConfig) if kind == "dpo" else (Labels, trl.KTOConfig)
    given = {
        "train_dataset": datasets.load_from_disk(str(directory / "data")),
        "processing_class": tokenizer(),
    }
    found = losses(trainer(model, reference, config(str(directory / "run"), **options), **given))
    return found, len(list((directory / "data").glob("cache-*")))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_results_of_another_reference_are_not_taken(kind: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    """The state of a reference had no tensors: all references took the results of the first one."""
    counts = []
    for name in ("other", "one", "one"):
        ours = peftfx.load(ZOO["llama"].build(), adapters["one"])
        ours.load_adapter(adapters[name], "ref")
        ours.set_adapter("default")
        got, count = run(kind, ours, ours.reference("ref"), tmp_path / "ours")
        reference = copy.deepcopy(peft_model(adapters[name])).merge_and_unload()
        want, _ = run(kind, peft_model(adapters["one"]), reference, tmp_path / "theirs")
        assert got == pytest.approx(want, abs=1e-5)
        counts.append(count)
    assert counts == [1, 2, 2]  # an equal reference takes what there is


def test_without_a_reference_the_base_counts_too(adapters: dict[str, Path], tmp_path: Path) -> None:
    """The reference is then the model as it is at the start: equal adapters on two bases are two references."""
    for factor in (1.0, 1.5):
        bases = [ZOO["llama"].build() for _ in range(2)]
        with torch.no_grad():
            for base in bases:
                base.model.layers[0].mlp.up_proj.weight.mul_(factor)
        got, _ = run("dpo", peftfx.load(bases[0], adapters["one"]), None, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(bases[1], str(adapters["one"]), is_trainable=True)
        assert got == pytest.approx(run("dpo", theirs, None, tmp_path / "theirs")[0], abs=1e-5)


def test_a_hash_has_all_that_a_reference_computes(adapters: dict[str, Path]) -> None:
    ours = peftfx.load(ZOO["llama"].build(), adapters["one"])
    ours.load_adapter(adapters["other"], "ref")
    ours.add_adapter("more", peftfx.LoRA(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    values = dict(ours.adapter("ref").tensors())
    with torch.no_grad():
        for name, tensor in ours.adapter("more").tensors():
            tensor.copy_(values[name])  # the same tensors, with another scale
    names = [(), ("default",), ("ref",), ("more",), ("default", "ref"), ("ref", "default")]
    found = [hash_module(ours.reference(chosen)) for chosen in names]
    assert len(set(found)) == len(found)
    for chosen, digest in zip(names, found, strict=True):
        ours.set_adapter(chosen)
        assert hash_module(ours) == digest
        assert hash_module(copy.deepcopy(ours).reference(chosen)) == digest
    with ours.disable_adapter():
        assert hash_module(ours) == found[0]
    randomise(ours.adapter("default"))
    assert hash_module(ours.reference("ref")) == found[2]
    assert hash_module(ours.reference("default")) != found[1]
    assert hash_module(ours.bfloat16().reference()) != found[0]


def test_a_state_of_another_reference_is_told_of() -> None:
    ours = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=4))
    reference = ours.reference()
    reference.load_state_dict(reference.state_dict())
    with pytest.warns(PeftfxWarning, match="another base, or with other adapters"):
        reference.load_state_dict(ours.reference("default").state_dict())


def test_a_reference_that_trl_does_not_copy(tmp_path: Path) -> None:
    """TRL copies tensors by a part of their names that IA3's have at the end: its reference is a new adapter."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(ZOO["llama"].build(), config)
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    want, _ = run("dpo", peft_model(tmp_path / "adapter"), None, tmp_path)
    found = []
    for names in ((), "ref"):
        ours = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter")
        ours.load_adapter(tmp_path / "adapter", "ref")
        ours.set_adapter("default")
        found.append(run("dpo", ours, ours.reference(names), tmp_path)[0])
    assert found[0] == pytest.approx(want, abs=1e-5)
    assert found[1][0] == pytest.approx(0.693147, abs=1e-5)
    assert want[0] != pytest.approx(found[1][0], abs=1e-4)
