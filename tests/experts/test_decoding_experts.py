"""A mixture of experts decodes behind a LoRA on its attention: tokens are routed anew at every size."""

from __future__ import annotations

import contextlib
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from torch import nn

import peftfx
import peftfx.runtime
from peftfx.errors import PeftfxWarning
from peftfx.views.dry_run import fake_run

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def build(**fields: object) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = hf.Qwen3MoeConfig(**SIZE, **sizes, **fields)
    return hf.Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("asks", [(), ("output_router_logits", "output_hidden_states")])
def test_it_generates_in_onnx_runtime_what_peft_generates(asks: tuple[str, ...], tmp_path: Path) -> None:
    """Also if its config asks for the loss of its routers, as in training: its own code then raises behind a cache."""
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    base = build(**dict.fromkeys(asks, True))
    peftfx.load(base, tmp_path / "adapter").export(tmp_path / "out", view="decode")
    assert all(getattr(base.config, name) for name in asks)

    ids = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    want = theirs.generate(input_ids=ids, attention_mask=mask, **options)
    with pytest.warns(PeftfxWarning, match="output_hidden_states") if asks else contextlib.nullcontext():
        served = peftfx.runtime.load(tmp_path / "out")
    got = served.generate(input_ids=ids, attention_mask=mask, **options)
    assert got.sequences.equal(want.sequences)
    for ours, own in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)


def test_a_dry_run_batches_experts_of_a_part_that_is_a_model() -> None:
    part = build()
    chosen = part.get_experts_implementation()
    with fake_run(nn.ModuleDict({"text": part})) as fake:
        assert part.config._experts_implementation == "batched_mm"
        assert part(fake(torch.zeros(2, 3, dtype=torch.long))).logits.shape == (2, 3, 64)
    assert part.get_experts_implementation() == chosen
