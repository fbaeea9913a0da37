"""CPT: HF PEFT's forward, loss, gradients and files, both ways; a call takes no labels."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftfx
from peftfx.errors import PeftfxError
from peftfx.methods.cpt import CPT
from peftfx.testing.models import Causal

BASE = Causal((), layers=1).build()
CALL = Causal((), layers=1).inputs(3, 5, 1)
LABELS = CALL["input_ids"].clone()
OPTIONS = {
    "cpt_token_ids": [3, 4, 5, 6, 7, 8],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 6, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.8,
    "opt_projection_epsilon": 0.5,
}


def test_it_computes_trains_and_saves_as_hf_peft(tmp_path: Path) -> None:
    config = peft.CPTConfig(task_type="CAUSAL_LM", **OPTIONS)
    theirs = peft.get_peft_model(copy.deepcopy(BASE), config).eval()
    ours = peftfx.transform(copy.deepcopy(BASE), CPT(**OPTIONS), inputs=CALL).eval()  # type: ignore[arg-type]
    ((_, delta),) = ours.adapter("default").named_parameters()
    own = theirs.prompt_encoder["default"].delta_embedding.weight
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        delta.copy_(torch.randn(delta.shape, generator=rng))
        own.copy_(delta)
    want = theirs(**CALL, labels=LABELS)
    logits = ours(**CALL).logits
    torch.testing.assert_close(logits, want.logits, atol=1e-5, rtol=1e-5)
    (method,) = (p.method for p in ours.adapter("default").placements)
    assert isinstance(method, CPT)
    loss = method.loss(logits, LABELS)
    torch.testing.assert_close(loss, want.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    want.loss.backward()
    torch.testing.assert_close(delta.grad, own.grad, atol=1e-6, rtol=1e-4)
    assert delta.grad is not None
    assert not delta.grad[[3, 5]].any()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    torch.testing.assert_close(one, other)
    read = peftfx.load(copy.deepcopy(BASE), tmp_path / "theirs", inputs=CALL).eval()
    torch.testing.assert_close(read(**CALL).logits, logits, atol=1e-5, rtol=1e-5)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**CALL, labels=LABELS).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_call_takes_no_labels_and_tokens_are_the_models() -> None:
    ours = peftfx.transform(copy.deepcopy(BASE), CPT(cpt_token_ids=[3, 4]), inputs=CALL)
    with pytest.raises(PeftfxError, match="includes the labels of its prompt"):
        ours(**CALL, labels=LABELS)
    for wrong in (99, -1):
        with pytest.raises(PeftfxError, match=f"token {wrong} is not among"):
            peftfx.transform(copy.deepcopy(BASE), CPT(cpt_token_ids=[3, wrong, 5]), inputs=CALL)
    with pytest.raises(PeftfxError, match="the prompt has 2 tokens, not 1"):
        CPT(cpt_token_ids=[3, 4], cpt_tokens_type_mask=[1])
