"""Models that choose one of several texts: rows of texts, of any number, as `peft` computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.zoo import TOKENS
from torch import nn

import peftfx
from peftfx import LoRA, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel

SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForMultipleChoice(hf.BertConfig(**SIZES)),
    "deberta-v2": lambda: hf.DebertaV2ForMultipleChoice(hf.DebertaV2Config(**SIZES, type_vocab_size=0)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_choices_is_free(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    got = peftfx.load(build(name), tmp_path / "adapter")
    report = got.export(tmp_path / "out")
    assert all(axes == ["batch", "choices", "sequence"] for axes in report.inputs.values())
    plain, served = OnnxModel(tmp_path / "out"), runtime.load(tmp_path / "out")
    for sizes in ({"batch": 1, "choices": 5, "sequence": 9}, {"batch": 3, "choices": 2, "sequence": 6}):
        inputs = example_inputs(got.base, sizes=sizes, seed=1)
        want = theirs(**inputs).logits
        assert want.shape == (sizes["batch"], sizes["choices"])
        torch.testing.assert_close(plain(**inputs)["logits"], want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(served(**inputs).logits, want, atol=1e-5, rtol=1e-4)


def test_a_choice_is_learned() -> None:
    adapted = peftfx.transform(build("bert"), LoRA(r=2), seed=0)
    adapted(**example_inputs(adapted.base, labels=True)).loss.backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())
