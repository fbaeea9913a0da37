"""Valid twins: adapters of every method that `peft` wrote, on one base that is captured once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from support.zoo import TOKENS
from torch import Tensor, nn

from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare

SIZES = {
    **TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
ADAPTER = "adapter.onnx_adapter"  #: the file beside an exported graph
_LM = {"task_type": "CAUSAL_LM"}
_PLACES = {"target_modules": ["q_proj", "down_proj"]}
_VIRTUAL = {"num_virtual_tokens": 3, **_LM}
CONFIGS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=5, rank_pattern={"down_proj": 3}, **_PLACES, **_LM),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **_PLACES, **_LM),
    "head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **_PLACES, **_LM),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], **_LM),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 7], target_modules=["embed_tokens"], **_LM),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=20, tinit=2, tfinal=2, **_PLACES, **_LM),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **_PLACES, **_LM),
    "vera": lambda: peft.VeraConfig(r=3, **_PLACES, **_LM),
    "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **_LM),
    "prompt": lambda: peft.PromptTuningConfig(**_VIRTUAL),
    "p_tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **_VIRTUAL),
    "prefix": lambda: peft.PrefixTuningConfig(**_VIRTUAL),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **_LM),
}


@dataclass(frozen=True)
class Twin:
    """An adapter's directory, unspoiled."""

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]


@dataclass
class Base:
    """A small LLaMA, captured, and what adapters made of it.

    Attributes:
        root: its directory is `base` below it.
        adapted: the model that adapters are loaded on; a case leaves none on it.
        twins: by the names in `CONFIGS`.
    """

    root: Path
    adapted: AdaptedModel
    twins: Mapping[str, Twin]
    _ours: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The eager model."""
        return self.adapted.base

    @staticmethod
    def make(root: Path) -> Base:
        """In an empty directory."""
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
        model.save_pretrained(root / "base")
        for name, config in CONFIGS.items():
            theirs = peft.get_peft_model(copy.deepcopy(model), config())
            randomise(theirs)
            theirs.save_pretrained(str(root / name))
        return Base(root, bare(model), {name: _read(root / name) for name in CONFIGS})

    def ours(self, directory: Path) -> Tensor:
        """What the model gives with the adapter in a directory; an adapter that was there before is not run again."""
        self.adapted.load_adapter(directory, "fuzzed")
        try:
            adapter = self.adapted.adapter("fuzzed")
            state = [(name, t.dtype, t.detach().double().sum().item(), t.shape) for name, t in adapter.tensors()]
            key = repr((adapter.rules, state))
            if key not in self._ours:
                with torch.no_grad():
                    self._ours[key] = self.adapted(**self.call()).logits
            return self._ours[key]
        finally:
            self.adapted.remove()

    def theirs(self, directory: Path) -> Tensor | None:
        """What `peft` gives with it; nothing where it cannot load or run it, or drops tensors of the file."""
        try:
            model = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), str(directory)).eval()
            with torch.no_grad():
                found = model(**self.call()).logits
            taken = peft.get_peft_model_state_dict(model).keys()
        except Exception:  # whatever it raises: there is nothing to compare with
            return None
        if not isinstance(model, peft.PeftModelForCausalLM) and model.active_peft_config.is_prompt_learning:
            return None  # without a task type it has no way to put a prompt ahead of the text, and leaves it out
        dropped = load_file(directory / "adapter_model.safetensors").keys() - taken
        return found if torch.isfinite(found).all() and not dropped else None

    def call(self) -> dict[str, Tensor]:
        """A call at a size that no capture saw."""
        ids = torch.randint(5, 60, (3, 5), generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _read(directory: Path) -> Twin:
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return Twin(config, load_file(directory / "adapter_model.safetensors"))
