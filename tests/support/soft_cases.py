"""What tests of soft prompts share: models by task, adapters of `peft` with random values, ours from the same start."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import peft
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.tasks import PEFT_TASKS
from peftfx.contract.sequence import PROMPT
from peftfx.model import api
from peftfx.model.adapted import AdaptedModel

COUNT = 4  #: of virtual tokens
TASK_TYPES: Mapping[str, str] = {task: name for name, task in PEFT_TASKS.items()}
#: Sizes that PEFT does not find by the names it looks for.
SIZES: Mapping[str, Mapping[str, int]] = {
    "electra": {"token_dim": 16},
    "distilbert": {"token_dim": 32, "num_attention_heads": 4},
    "mpt": {"num_attention_heads": 4},
}
PREFIX_SIZES: Mapping[str, Mapping[str, int]] = {
    "falcon": {"token_dim": 8, "num_attention_heads": 1},
    "mpt": {"num_attention_heads": 4},
}
CAUSAL = (
    *("gpt2", "bloom", "opt", "gpt_neo", "gpt_j", "gpt_neox", "llama", "glm", "qwen2", "mistral", "gemma", "phi"),
    *("falcon", "mpt", "gemma2", "qwen3", "phi3"),
)
ENCODERS = ("bert", "roberta", "deberta", "deberta_v2", "distilbert", "electra")
BOTH = ("t5", "bart")
FEATURES = "features"  #: BERT without a head: peft 0.21.2 raises for every classifier under a prefix


def build(name: str) -> nn.Module:
    """A model of the zoo, or `FEATURES`."""
    return ZOO["bert"].build().bert if name == FEATURES else ZOO[name].build()


@cache
def shared(name: str) -> AdaptedModel:
    """Our model of `build(name)`, captured once; whoever takes it puts other adapters on it, and leaves the base."""
    return api.bare(build(name))


def task(name: str) -> str:
    """What it is for."""
    return "feature-extraction" if name == FEATURES else ZOO[name].task


def inputs_of(name: str, batch: int, sequence: int, *, labels: bool = False) -> dict[str, Tensor]:
    """Keyword arguments of a call."""
    sizes = {"batch": batch, "sequence": sequence, "decoder_sequence": sequence - 2}
    return example_inputs(build(name), task(name), sizes=sizes, seed=4, labels=labels and name != FEATURES)


@dataclass(frozen=True)
class Soft:
    """A soft prompt in peft's words and in ours."""

    config: type[peft.PeftConfig]
    method: type[peftfx.contract.sequence.SequenceMethod]
    options: Mapping[str, object]

    def theirs(self, name: str, model: nn.Module | None = None) -> nn.Module:
        """peft's model on a model of the zoo (or another like it), every trained value off its start, in eval mode."""
        base = build(name) if model is None else model
        sizes = PREFIX_SIZES if self.config is peft.PrefixTuningConfig else SIZES
        options = {"num_virtual_tokens": COUNT, **sizes.get(name, {}), **self.options}
        made = peft.get_peft_model(base, self.config(task_type=TASK_TYPES[task(name)], **options))
        randomise(made)
        return made.eval()

    def ours(self, theirs: nn.Module, adapted: AdaptedModel | None = None) -> AdaptedModel:
        """Our model of the same base, with the same adapter, its encoder and the heads that peft trains included.

        It is of a base of its own, or `adapted`, which loses the adapters that it has.
        """
        config = theirs.peft_config["default"]
        rule = self.method(num_virtual_tokens=COUNT, modules_to_save=heads(theirs) or None, **self.options)
        adapted = adapted or api.bare(bare(theirs))
        adapted.remove()
        adapted.add_adapter("default", rule, seed=0)
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
PREFIX = Soft(peft.PrefixTuningConfig, peftfx.PrefixTuning, {})
PROJECTED = Soft(peft.PrefixTuningConfig, peftfx.PrefixTuning, {"prefix_projection": True, "encoder_hidden_size": 24})
LSTM = Soft(
    peft.PromptEncoderConfig, peftfx.PTuning, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}
)


KINDS = {"prompt": PROMPT_TUNING, "mlp": MLP, "lstm": LSTM, "prefix": PREFIX, "projected": PROJECTED}


def on(*names: str, kinds: Iterable[str] = KINDS, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Soft prompts on models, `slow` ones not in every run; peft has no prefix for a classifier: features stand in."""

    def stand_in(kind: str, name: str) -> str:
        return FEATURES if name == "bert" and kind in ("prefix", "projected") else name

    pairs = [(kind, name) for kind in kinds for name in (*names, *(n for n in slow if n not in KINDS))]
    return pytest.mark.parametrize(
        ("soft", "name"), [of(k, stand_in(k, n), slow=n in slow or k in slow) for k, n in pairs]
    )


def each(*quick: str) -> pytest.MarkDecorator:
    """Each kind of soft prompt, some in every run."""
    return pytest.mark.parametrize("soft", [of(kind, slow=kind not in quick) for kind in KINDS])


def of(kind: str, *name: str, slow: bool) -> ParameterSet:
    """A soft prompt, on a model."""
    return pytest.param(KINDS[kind], *name, id="-".join((kind, *name)), marks=pytest.mark.slow if slow else ())


ABSOLUTE = 1e-5


def close(got: Tensor, want: Tensor, tolerance: float = ABSOLUTE) -> None:
    assert got.shape == want.shape
    error = float((got - want).detach().abs().max())
    assert error <= tolerance * max(1.0, float(want.abs().max())), error


def close_all(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = ABSOLUTE) -> None:
    names = want.keys() - {"cache"}  # some models hand peft's prefix back
    assert got.keys() - {"cache"} == names
    for name in names:
        close(got[name], want[name], tolerance)
