"""An adapter's dropout is a module, as in HF PEFT: code that finds each `torch.nn.Dropout` of a model can change it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from support.adapted import randomise, trained
from support.zoo import ZOO
from torch import nn

import peftfx

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def set_rate(rate: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate

    return change


def evaluate(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def losses(model: nn.Module) -> list[float]:
    return trained(model, lambda: model(input_ids=IDS, labels=IDS).loss)


CHANGES = {"off": set_rate(0.0), "more": set_rate(0.6), "eval": evaluate}
CONFIGS = [
    peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.3),
    peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3, use_dora=True),
    peft.VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=0.3),
    peft.DeloraConfig(r=4, target_modules=["q_proj"], module_dropout=0.3),
]


def _cases() -> Iterator[ParameterSet]:
    """Each change with the first method, and one with each."""
    for config, method in zip(CONFIGS, ("LoRA", "DoRA", "VeRA", "DeLoRA"), strict=True):
        for name, change in CHANGES.items():
            marks = () if method == "LoRA" or name == "more" else pytest.mark.further
            yield pytest.param(config, change, id=f"{method}-{name}", marks=marks)


@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize(("config", "change"), [*_cases()])
def test_changed_it_trains_as_in_peft(
    config: peft.PeftConfig, change: Callable[[nn.Module], None], road: str, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), copy.deepcopy(config))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(ZOO["llama"].build(), tmp_path, road=road)
    for model in (theirs.train(), ours.train()):
        losses(copy.deepcopy(model))  # calls before the change leave nothing behind
        change(model)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    names = [name for name in vars(config) if name.endswith("_dropout")]
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert [saved[name] for name in names] == [getattr(config, name) for name in names]


def test_switched_on_again_it_drops() -> None:
    ours = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=2, lora_dropout=0.5, init_lora_weights=False)).train()
    evaluate(ours)
    assert losses(copy.deepcopy(ours)) == losses(copy.deepcopy(ours))
    torch.manual_seed(0)
    without = ours(input_ids=IDS).logits
    ours.train()
    torch.manual_seed(0)
    assert not torch.equal(ours(input_ids=IDS).logits, without)
    assert not any("dropout" in name for name in ours.state_dict())


def test_without_dropout_there_is_no_module() -> None:
    ours = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=2))
    assert not [m for m in ours.adapters.modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=1.0),
        peft.LoHaConfig(r=2, target_modules=["q_proj"], module_dropout=1.0),
        peft.LoKrConfig(r=2, target_modules=["q_proj"], module_dropout=1.0),
    ],
)
def test_a_dropout_of_1_leaves_the_adapter_out_in_training_alone(
    config: peft.PeftConfig, road: str, tmp_path: Path
) -> None:
    """Its files were refused."""
    theirs = peft.get_peft_model(ZOO["llama"].build(), copy.deepcopy(config))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(ZOO["llama"].build(), tmp_path, road=road)
    for mode in (True, False):
        with torch.no_grad():
            got, want = (model.train(mode)(input_ids=IDS).logits for model in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert not any(p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_rows_are_not_all_dropped() -> None:
    with pytest.raises(peftfx.PeftfxError, match="no row of the update would be left"):
        peftfx.LoHa(rank_dropout=1.0)
