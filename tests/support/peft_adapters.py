"""Adapters of every method that `peft` has, with random values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import peft
from support.adapted import randomise
from support.parity import adaptable
from support.soft_cases import LSTM, MLP, PREFIX, PROJECTED, PROMPT_TUNING, Soft, bare, build
from torch import nn

import peftfx


def linear(model: nn.Module, *roles: str) -> list[str]:
    """The paths of linear modules that `peft` can adapt; with roles, those that have one of them."""
    sites = [s for s in peftfx.inspect(model) if s.kind == "linear" and s.role != "head"]
    sites = [s for s in sites if adaptable(model.get_submodule(s.path))]
    fused = {s.path: {s.role, *(p.role for p in s.parts)} for s in sites}
    return [path for path, own in fused.items() if not roles or own & set(roles)]


ADAPTION = ("llama", "mistral", "gpt2")  # what peft knows


def adapted(method: str, name: str) -> tuple[nn.Module, nn.Module]:
    """A base, and `peft`'s model on a copy of it, every adapter off its start."""
    if method in SOFT:
        theirs = SOFT[method].theirs(name)
        return bare(theirs), theirs
    base = build(name)
    if method == "adaption":
        config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    else:
        config = WEIGHTS[method](base)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    return base, theirs.eval()


def ia3(model: nn.Module) -> peft.PeftConfig:
    down = linear(model, "mlp.down")
    target = [*linear(model, "attention.key", "attention.value", "attention.query"), *down]
    return peft.IA3Config(target_modules=target, feedforward_modules=down)


def dora(model: nn.Module) -> peft.PeftConfig:
    return peft.LoraConfig(target_modules=linear(model), r=4, lora_alpha=6, use_dora=True)


def adalora(model: nn.Module) -> peft.PeftConfig:
    return peft.AdaLoraConfig(target_modules=linear(model), init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2)


def vera(model: nn.Module) -> peft.PeftConfig:
    return peft.VeraConfig(target_modules=linear(model), r=6, projection_prng_key=2)


def ln_tuning(model: nn.Module) -> peft.PeftConfig:
    return peft.LNTuningConfig(target_modules=[s.path for s in peftfx.inspect(model) if s.kind == "norm"])


WEIGHTS: Mapping[str, Callable[[nn.Module], peft.PeftConfig]] = {
    "ia3": ia3,
    "dora": dora,
    "adalora": adalora,
    "vera": vera,
    "ln_tuning": ln_tuning,
}
SOFT: Mapping[str, Soft] = {"prompt": PROMPT_TUNING, "mlp": MLP, "lstm": LSTM, "prefix": PREFIX, "projected": PROJECTED}
