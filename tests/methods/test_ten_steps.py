"""Ten AdamW steps here and in `peft`, from one start and on the same batches, give the same adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import ten_steps
import torch
import transformers as hf
from support.adapted import randomise
from ten_steps import CLOSE, DROPOUT, METHODS, MODELS, Method, Model

import peftfx

#: By default, some methods on one model, others in their own files; `pytest -m slow` has every pair.
QUICK = {"LoRA": 0, "IA3": 1, "VeRA": 1, "LN tuning": 0, "Prefix tuning": 0}


def _pairs() -> list[object]:
    return [
        pytest.param(m, n, id=f"{m.name}-{n.name}", marks=() if QUICK.get(m.name) == place else pytest.mark.slow)
        for m in METHODS
        for place, n in enumerate(MODELS)
    ]


@pytest.mark.parametrize(("method", "model"), _pairs())
def test_the_adapter_is_pefts_with_dropout_and_without(
    method: Method, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[bool] = []
    train = ten_steps.train

    def watched(trained: object, batches: object) -> list[float]:
        losses = train(trained, batches)  # type: ignore[arg-type]
        moved.append(losses[-1] != losses[0])
        return losses

    monkeypatch.setattr(ten_steps, "train", watched)
    for dropout in (0.0, DROPOUT):
        found = ten_steps.compare(method, model, dropout)
        if found.reason:
            assert "Prefix" in method.name
            assert "classifier" in model.name, found.reason
            return
        assert found.adapter < CLOSE, found
        assert found.loss < CLOSE, found
    assert moved == [True] * 4


HALF = [
    {"lora_alpha": 12},
    {"use_rslora": True},
    {"lora_bias": True},
    {"lora_dropout": 0.3},
    {"use_dora": True},
    {"use_dora": True, "lora_dropout": 0.3},
]


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 base", "autocast"])
@pytest.mark.parametrize("options", HALF, ids=str)
def test_loras_steps_in_half_precision_are_pefts_to_the_bit(
    options: dict[str, object], autocast: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"vocab_size": 60, "attention_bias": True}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**size, **more, num_hidden_layers=2))
    base = base if autocast else base.bfloat16()
    ends = ["q_proj", "v_proj", "down_proj", "embed_tokens"][: 3 if autocast or "lora_bias" in options else 4]
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": ends, "task_type": "CAUSAL_LM"} | options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(base, tmp_path)
    ids = torch.randint(60, (4, 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        losses = [ten_steps.train(model, [{"input_ids": ids, "labels": ids}] * 5) for model in (ours, theirs)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]
    got, want = peftfx.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {name for name in want if "lora_" in name} == got.keys()  # peft adds an embedding's own weight
    assert all(torch.equal(got[name], want[name]) for name in got)
