"""BitFit: every bias and nothing else, as HF PEFT's LoRA with `bias="all"` whose own update is nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.parity import farthest, outputs
from support.zoo import ZOO

import peftfx
from peftfx.errors import PeftfxError


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_it_trains_what_peft_trains_beside_a_lora(name: str) -> None:
    base = ZOO[name].build()
    config = peft.LoraConfig(r=1, target_modules=["query", "c_attn"], bias="all")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    named = theirs.base_model.model.named_parameters()
    biases = {n.replace(".base_layer", ""): p for n, p in named if n.endswith(".bias")}
    adapted = peftfx.transform(base, "bitfit")
    randomise(adapted)
    ours = {n.removeprefix("saved."): p for n, p in adapted.adapter("default").named_parameters()}
    assert ours.keys() == biases.keys()
    with torch.no_grad():
        for path, bias in biases.items():
            bias.copy_(ours[path])
    given = ZOO[name].inputs(3, 5, 1, model=base)
    assert farthest(outputs(adapted, given), outputs(theirs, given), given) <= 1e-5


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    base = ZOO["bert"].build()
    adapted = peftfx.transform(base, peftfx.BitFit(target="attention | norm"))
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = peftfx.load(copy.deepcopy(adapted).remove(), tmp_path)
    given = ZOO["bert"].inputs(2, 5, 1, model=base)
    assert farthest(outputs(loaded, given), outputs(adapted, given), given) == 0


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(PeftfxError, match="no targeted module has what BitFit trains"):
        peftfx.transform(ZOO["t5"].build(), "bitfit")
