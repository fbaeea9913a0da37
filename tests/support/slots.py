"""Exports with places for adapters, and adapters to put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from support.zoo import ZOO
from torch import Tensor

from peftfx import (
    IA3,
    AdaLoRA,
    LlamaAdapter,
    LNTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    VeRA,
    runtime,
    transform,
)
from peftfx.export.command import export_directory
from peftfx.model.adapted import AdaptedModel


def stirred(adapted: AdaptedModel, *names: str) -> AdaptedModel:
    """The model with every value of these adapters off its start."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in names:
            for p in adapted.adapter(name).parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
    return adapted.eval()


@dataclass
class Deployed:
    """A base in a directory, and the graph of it that adapters are put into."""

    name: str
    root: Path

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The base, in torch: captures are shared."""
        return transform(ZOO[self.name].build(), RULES["lora"], "first")

    @cached_property
    def served(self) -> runtime.Served:
        return runtime.load(self.root / "graph")

    def with_rule(self, rule: object) -> AdaptedModel:
        """The base with an adapter of this rule alone."""
        for name in self.adapted.names():
            self.adapted.remove(name)
        self.adapted.add_adapter("x", rule, seed=1)
        return stirred(self.adapted, "x")


def deploy(name: str, root: Path) -> Deployed:
    ZOO[name].build().save_pretrained(root / "base")
    export_directory(root / "base", root / "graph", view="auto", slots="all-linear", task=ZOO[name].task)
    return Deployed(name, root)


def texts() -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.5}


def adapted_by(name: str, rules: dict[str, object]) -> AdaptedModel:
    """A model with an adapter of each rule, every value off its start."""
    model = transform(ZOO[name].build(), next(iter(rules.values())), next(iter(rules)), seed=0)
    for other in list(rules)[1:]:
        model.add_adapter(other, rules[other], seed=0)
    return stirred(model, *rules)


#: A rule of each method, and of what stands beside another.
RULES: Mapping[str, object] = {
    "lora": LoRA(r=4, lora_alpha=7, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, target="all-linear"),
    "dora": LoRA(r=3, use_dora=True, target="attention.query | mlp"),
    "adalora": AdaLoRA(init_r=5, target="all-linear"),
    "ia3": IA3(),
    "vera": VeRA(r=5, target="all-linear"),
    "prompt_tuning": PromptTuning(num_virtual_tokens=5),
    "p_tuning": PTuning(num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix_tuning": PrefixTuning(num_virtual_tokens=4),
    "llama_adapter": LlamaAdapter(adapter_len=6),
    "ln_tuning": LNTuning(),
    "pissa": LoRA(r=2, init_lora_weights="pissa", target="mlp"),
    "prompt and lora": [PromptTuning(num_virtual_tokens=2), LoRA(r=2, target="attention.value | mlp.down")],
    "llama_adapter and lora": [LlamaAdapter(adapter_len=3), LoRA(r=2, target="attention.key | attention.value")],
}
