"""A prefix whose first tokens are not trained: HF PEFT's numbers, files both ways, and what is trained of them."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftfx
from peftfx.errors import PeftfxError
from peftfx.testing.models import Causal

BASE = Causal((), layers=2, groups=2).build()
IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def outputs(model: torch.nn.Module) -> Tensor:
    return model(**CALL).logits


def test_it_computes_trains_and_saves_as_hf_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=2)
    theirs = peft.get_peft_model(copy.deepcopy(BASE), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftfx.load(copy.deepcopy(BASE), tmp_path / "theirs").eval()
    torch.testing.assert_close(outputs(ours), outputs(theirs), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        outputs(model).square().sum().backward()
    ((_, trained),) = ours.adapter("default").named_parameters()
    want = theirs.prompt_encoder["default"].trainable_embedding.grad
    assert trained.grad is not None
    assert trained.shape == (2, want.shape[1])
    torch.testing.assert_close(trained.grad, want, atol=1e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other)
    assert not list((tmp_path / "ours").glob("peftfx_*"))
    read = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(ours), outputs(read), atol=1e-5, rtol=1e-5)


def test_more_tokens_than_there_are_cannot_be_frozen() -> None:
    with pytest.raises(PeftfxError, match="3 of 2 virtual tokens"):
        peftfx.Cartridge(num_virtual_tokens=2, num_frozen_tokens=3)
