"""Starts of LoRA that need data or another base: HF PEFT makes them, and what it writes is loaded, merged and saved."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from support.adapted import randomise
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx.errors import PeftfxError
from peftfx.rules.peft_files import WEIGHTS

TARGETS = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.randint(32, (6, 9), generator=torch.Generator().manual_seed(3))


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def eva() -> peft.PeftModel:
    config = peft.LoraConfig(**TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    made = peft.get_peft_model(base(), config)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in IDS]
    peft.initialize_lora_eva_weights(made, torch.utils.data.DataLoader(rows, batch_size=2), show_progress_bar=False)
    return made


def lora_ga() -> peft.PeftModel:
    model = base()
    config = peft.LoraConfig(**TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    return peft.get_peft_model(model, config)


def corda() -> peft.PeftModel:
    stand_in = types.ModuleType("attr")  # of attrs, which HF PEFT reads one decorator from and does not require
    stand_in.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    sys.modules.setdefault("attr", stand_in)
    from peft.tuners.lora.corda import preprocess_corda

    model = base()
    config = peft.LoraConfig(**TARGETS, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    with torch.no_grad():
        preprocess_corda(model, config, lambda: [model(input_ids=row[None]) for row in IDS])
    return peft.get_peft_model(model, config)


def loftq() -> peft.PeftModel:
    pytest.importorskip("bitsandbytes")  # HF PEFT asks for it, at 8 bits too
    to = torch.Tensor.to  # HF PEFT's LoftQ computes on a GPU alone

    def on_the_cpu(tensor: torch.Tensor, *places: object, **named: object) -> torch.Tensor:
        named |= {"device": "cpu"} if "device" in named else {}
        return to(tensor, *("cpu" if place == "cuda" else place for place in places), **named)

    config = peft.LoraConfig(**TARGETS, init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", on_the_cpu)
        return peft.get_peft_model(base(), config)


def answers(model: Callable[..., object]) -> torch.Tensor:
    return model(input_ids=IDS).logits.detach()  # type: ignore[attr-defined]


def trained(made: peft.PeftModel) -> peft.PeftModel:
    """Off its start, by as much as training moves it."""
    before = {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}
    randomise(made)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name in before:
                p.mul_(0.1).add_(before[name])
    return made.eval()


@pytest.mark.parametrize("start", [eva, lora_ga, corda], ids=lambda start: start.__name__)
def test_an_adapter_of_hf_pefts_own_start_is_loaded_merged_and_saved(
    start: Callable[[], peft.PeftModel], tmp_path: Path
) -> None:
    made = start()
    made.save_pretrained(tmp_path / "begun")
    theirs = trained(made)
    want = answers(theirs)
    moved = start is not eva  # the others move the base's weights: HF PEFT's conversion leaves a LoRA of twice the rank
    theirs.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "begun") if moved else None
    )
    assert float((answers(base()) - want).abs().max()) > 1e-3
    ours = peftfx.load(base(), tmp_path / "lora", inputs={"input_ids": IDS})
    torch.testing.assert_close(answers(ours), want, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / "lora" / WEIGHTS))
    ours.merge()
    torch.testing.assert_close(answers(ours.base), want, atol=1e-5, rtol=1e-5)


def test_one_that_was_not_converted_is_refused_with_what_to_do(tmp_path: Path) -> None:
    trained(corda()).save_pretrained(tmp_path)
    with pytest.raises(PeftfxError, match=r"corda moves the base's weights(?s:.*)path_initial_model"):
        peftfx.load(base(), tmp_path, inputs={"input_ids": IDS})


@pytest.mark.parametrize("start", [lora_ga, corda, loftq], ids=lambda start: start.__name__)
def test_over_the_base_that_a_start_has_moved_it_is_a_plain_lora(
    start: Callable[[], peft.PeftModel], tmp_path: Path
) -> None:
    theirs = start()
    moved = copy.deepcopy(theirs).unload()
    assert float((answers(moved) - answers(base())).abs().max()) > 1e-5
    theirs.peft_config["default"].init_lora_weights = True
    trained(theirs).save_pretrained(tmp_path)
    ours = peftfx.load(moved, tmp_path, inputs={"input_ids": IDS})
    torch.testing.assert_close(answers(ours), answers(theirs), atol=1e-5, rtol=1e-5)


def test_a_model_that_hf_peft_has_started_is_taken_over() -> None:
    theirs = trained(eva())
    torch.testing.assert_close(answers(peftfx.transform(theirs)), answers(theirs), atol=1e-5, rtol=1e-5)
