"""What tests of soft prompts share: models by task, adapters of `peft` with random values, ours from the same start."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import peft
import torch
from test_export import randomise
from torch import Tensor, nn
from zoo import ZOO

import peftfx
from peftfx.adapted import AdaptedModel
from peftfx.soft import PROMPT
from peftfx.tasks import PEFT_TASKS

COUNT = 4  #: of virtual tokens
TASK_TYPES: Mapping[str, str] = {task: name for name, task in PEFT_TASKS.items()}
#: Sizes that PEFT does not find by the names it looks for.
SIZES: Mapping[str, Mapping[str, int]] = {
    "electra": {"token_dim": 16},
    "distilbert": {"token_dim": 32, "num_attention_heads": 4},
    "mpt": {"num_attention_heads": 4},
}


@dataclass(frozen=True)
class Soft:
    """A soft prompt in peft's words and in ours."""

    config: type[peft.PeftConfig]
    method: type[peftfx.soft.SequenceMethod]
    options: Mapping[str, object]

    def theirs(self, name: str, model: nn.Module | None = None) -> nn.Module:
        """peft's model on a model of the zoo (or another like it), every trained value off its start, in eval mode."""
        base = ZOO[name].build() if model is None else model
        options = {"num_virtual_tokens": COUNT, **SIZES.get(name, {}), **self.options}
        made = peft.get_peft_model(base, self.config(task_type=TASK_TYPES[ZOO[name].task], **options))
        randomise(made)
        return made.eval()

    def ours(self, theirs: nn.Module) -> AdaptedModel:
        """Our model of the same base, with the same adapter, its encoder and the heads that peft trains included."""
        config = theirs.peft_config["default"]
        rule = self.method(num_virtual_tokens=COUNT, modules_to_save=heads(theirs) or None, **self.options)
        adapted = peftfx.transform(bare(theirs), rule, seed=0)
        own = dict(adapted.adapter("default").tensors())
        with torch.no_grad():
            for key, value in theirs.prompt_encoder["default"].state_dict().items():
                name = PROMPT if f"sequence.{PROMPT}" in own else key.replace(".", "_")
                own.pop(f"sequence.{name}").copy_(value)
            for path in heads(theirs):
                trained = theirs.base_model.get_submodule(path).modules_to_save["default"]
                for key, value in trained.state_dict().items():
                    own.pop(f"saved.{path}.{key}").copy_(value)
        assert not own, f"peft has nothing for {sorted(own)}"
        assert config.num_virtual_tokens == COUNT
        return adapted.eval()


def heads(theirs: nn.Module) -> list[str]:
    """The modules that peft trains whole."""
    return [name for name, m in theirs.base_model.named_modules() if hasattr(m, "modules_to_save") and "." not in name]


def bare(theirs: nn.Module) -> nn.Module:
    """A copy of the base under peft's wrappers, as it was."""
    base = copy.deepcopy(theirs.base_model)
    for path in heads(theirs):
        setattr(base, path, base.get_submodule(path).original_module)
    return base.requires_grad_(True)


def trained(theirs: nn.Module) -> dict[str, Tensor]:
    """What peft trains, by the names that it has in our adapter."""
    own = {f"sequence.{k.replace('.', '_')}": p for k, p in theirs.prompt_encoder["default"].named_parameters()}
    if list(own) == ["sequence.embedding_weight"]:
        own = {f"sequence.{PROMPT}": own["sequence.embedding_weight"]}
    for path in heads(theirs):
        head = theirs.base_model.get_submodule(path).modules_to_save["default"]
        own |= {f"saved.{path}.{k}": p for k, p in head.named_parameters()}
    return own


PROMPT_TUNING = Soft(peft.PromptTuningConfig, peftfx.PromptTuning, {})
MLP = Soft(peft.PromptEncoderConfig, peftfx.PTuning, {"encoder_hidden_size": 24})
LSTM = Soft(
    peft.PromptEncoderConfig, peftfx.PTuning, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}
)
