"""Files of adapters: sizes are compared before memory is asked for, and no tensor of a file replaces another."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import peftfx
from peftfx.errors import PeftfxError

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MANY = 50_000_000
LORA, TEXT = {"r": 4, "target_modules": ["q_proj"]}, {"task_type": "CAUSAL_LM"}
PROMPT = {**TEXT, "num_virtual_tokens": 4}
CASES: dict[str, tuple[peft.PeftConfig, dict[str, object]]] = {
    "rank": (peft.LoraConfig(**LORA), {"r": MANY}),
    "rank of a module": (peft.LoraConfig(**LORA), {"rank_pattern": {"q_proj": MANY}}),
    "rank of DoRA": (peft.LoraConfig(**LORA, use_dora=True), {"r": MANY}),
    "rank of VeRA": (peft.VeraConfig(**LORA), {"r": MANY}),
    "virtual tokens": (peft.PromptTuningConfig(**PROMPT), {"num_virtual_tokens": MANY}),
    "prefix": (peft.PrefixTuningConfig(**PROMPT), {"num_virtual_tokens": MANY}),
    "adapter length": (peft.AdaptionPromptConfig(**TEXT, adapter_len=4, adapter_layers=1), {"adapter_len": MANY}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize("name", CASES)
def test_a_size_that_is_not_the_files_costs_no_memory(name: str, tmp_path: Path) -> None:
    made, change = CASES[name]
    peft.get_peft_model(model(), made).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PeftfxError, match=rf"of another shape(.|\n)*{MANY}.* in this model"):
        peftfx.load(model(), tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kB"


def test_two_keys_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """One with HF PEFT's prefix and one without are one name: which one counts is not said."""
    peft.get_peft_model(model(), peft.LoraConfig(**LORA)).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = min(tensors)
    tensors[first.removeprefix("base_model.model.")] = torch.ones_like(tensors[first])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PeftfxError, match="two keys are one tensor") as raised:
        peftfx.load(model(), tmp_path)
    assert first in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("base_model.", "module.base_model.", "'module' in the keys is of a wrapper of torch"),
        ("base_model.model.", "base_model.model._orig_mod.", "'_orig_mod' in the keys is of a wrapper of torch"),
        (
            "layers.0.",
            "layers.0._checkpoint_wrapped_module.",
            "'_checkpoint_wrapped_module' in the keys is of a wrapper",
        ),
        (".weight", ".default.weight", "'default' in the keys is an adapter's name"),
    ],
)
def test_keys_of_a_whole_state_are_told(old: str, new: str, told: str, tmp_path: Path) -> None:
    """HF PEFT loads such a file without these tensors."""
    peft.get_peft_model(model(), peft.LoraConfig(**LORA)).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key.replace(old, new, 1): t for key, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PeftfxError, match="unexpected") as raised:
        peftfx.load(model(), tmp_path)
    assert raised.value.hint.startswith(told)
