"""Layers in torch's wrapper for activation checkpointing, which Accelerate's FSDP2 uses: paths are those without it."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.adapted import adapt, randomise
from support.captures import own_capture
from support.zoo import ZOO
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import peftfx
from peftfx.views import capture


@pytest.mark.parametrize("first", ["wrapped", "adapted"])
def test_wrapped_layers_are_trained_saved_and_merged_as_the_layers_in_them(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until now a merge and an export were refused, or the saved names had the wrapper in them."""
    monkeypatch.setattr(capture, "_captured", own_capture)  # a remembered graph may have the wrapper's names
    rule, base = peftfx.LoRA(r=4, target="attention"), ZOO["llama"].build()
    inputs = ZOO["llama"].inputs(model=base, labels=True)
    made = peftfx.transform(base, rule, seed=0) if first == "adapted" else None
    apply_activation_checkpointing(base, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    model = peftfx.transform(base, rule, seed=0) if made is None else made
    plain = adapt("llama", rule).train()
    randomise(model)
    plain.load_state_dict(model.state_dict())
    for one in (model.train(), plain):
        one(**inputs, use_cache=False).loss.backward()  # a layer that is run again would add to a cache
    for (name, p), (own, q) in zip(model.adapters.named_parameters(), plain.adapters.named_parameters(), strict=True):
        assert name == own
        torch.testing.assert_close(p.grad, q.grad)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = plain.eval()(**inputs).logits
        theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path)).eval()
        torch.testing.assert_close(theirs(**inputs).logits, want)
        model.eval().load_adapter(tmp_path, "again")
        torch.testing.assert_close(model(**inputs).logits, want)
        assert all("wrapped" not in status.name for status in model.get_layer_status())
        model.merge()
        torch.testing.assert_close(model.remove()(**inputs).logits, want, rtol=1e-4, atol=1e-5)
