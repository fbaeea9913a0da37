"""`set_peft_model_state_dict` and `hotswap_adapter` of what `peft` gives, whatever way the base stores its weights."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.adapted import adapt, randomise
from support.zoo import ZOO

import peftfx


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte", "lm_head"]}),  # one weight, which the state has twice
        ("gemma2", {"target_modules": ["embed_tokens", "lm_head"]}),
    ],
)
def test_a_state_of_peft(base: str, options: dict[str, list[str]], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(ZOO[base].build(), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    ours = peftfx.transform(ZOO[base].build(), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    given = ZOO[base].inputs(3, 7, model=ours.base)
    randomise(theirs, 3)
    peftfx.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=0, atol=1e-5)
    randomise(theirs, 4)
    theirs.save_pretrained(str(tmp_path))
    peftfx.hotswap_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=0, atol=1e-5)


OWN = ["oft(oft_block_size=4)", "fourierft(n_frequency=10)", "vera(r=4)", "boft", "psoft(r=8)", "adalora"]


@pytest.mark.parametrize("rule", OWN)
def test_a_models_own_state(rule: str) -> None:
    adapted = adapt("gpt2", f"{rule}@mlp.up")
    own = {name: 1.5 * tensor for name, tensor in peftfx.get_peft_model_state_dict(adapted).items()}
    peftfx.set_peft_model_state_dict(adapted, own)
    got = peftfx.get_peft_model_state_dict(adapted)
    assert own
    assert all(torch.equal(got[name], tensor) for name, tensor in own.items())
