"""The same training, step by step: from one start and on one set of batches, ten AdamW steps here and in `peft`.

    python benchmarks/ten_steps.py

Prints a Markdown table for each method on a decoder, an encoder and an encoder-decoder: the largest difference between
the two adapters, relative to the largest value of the tensor that it is in, without dropout, and with dropout in the
model and the adapter under one seed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Literal

import peft
import torch
import transformers as hf
from measure import versions
from safetensors.torch import load_file
from torch import Tensor, nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.model.adapted import AdaptedModel

STEPS, RATE, DROPOUT, CLOSE = 10, 1e-3, 0.1, 1e-5
TOKENS: Mapping[str, int] = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
SIZES: Mapping[str, int] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(dropout: float) -> nn.Module:
    """A decoder with grouped heads."""
    config = hf.LlamaConfig(**TOKENS, **SIZES, num_key_value_heads=2, intermediate_size=48, attention_dropout=dropout)
    return hf.LlamaForCausalLM(config)


def bert(dropout: float) -> nn.Module:
    """An encoder with a classifier."""
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertForSequenceClassification(
        hf.BertConfig(**TOKENS, **SIZES, intermediate_size=48, max_position_embeddings=64, num_labels=3, **drops)
    )


def features(dropout: float) -> nn.Module:
    """The same encoder without a head."""
    model = bert(dropout).bert
    assert isinstance(model, nn.Module)
    return model


def t5(dropout: float) -> nn.Module:
    """An encoder-decoder."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
    return hf.T5ForConditionalGeneration(hf.T5Config(**TOKENS, **sizes, dropout_rate=dropout))


@dataclass(frozen=True)
class Model:
    """A tiny model to train on: its name in the table, and what `peft` calls its task."""

    name: str
    build: Callable[[float], nn.Module] = field(repr=False)
    task: str
    linears: tuple[str, ...]
    norms: tuple[str, ...]

    def make(self, dropout: float) -> nn.Module:
        """The model; equal calls give equal weights, none of them at its initial value."""
        torch.manual_seed(0)
        model = self.build(dropout)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        return model

    def batches(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """A batch for each step; the last row of each is padded."""
        sizes = {"batch": 4, "sequence": 9, "decoder_sequence": 6}
        labelled = self.task != "FEATURE_EXTRACTION"
        return [example_inputs(model, sizes=sizes, labels=labelled, seed=seed) for seed in range(STEPS)]


DECODER = Model("decoder (LLaMA)", llama, "CAUSAL_LM", ("q_proj", "v_proj", "down_proj"), ("input_layernorm", "norm"))
ENCODER = Model("encoder (BERT, classifier)", bert, "SEQ_CLS", ("query", "value", "output.dense"), ("LayerNorm",))
FEATURES = replace(ENCODER, name="encoder (BERT, features)", build=features, task="FEATURE_EXTRACTION")
BOTH = Model("encoder-decoder (T5)", t5, "SEQ_2_SEQ_LM", ("q", "v", "wo"), ("layer_norm",))


@dataclass(frozen=True)
class Method:
    """A method as `peft` configures it; `at` says at which modules of a model, `drops` where its own dropout is set."""

    name: str
    config: type[peft.PeftConfig]
    options: Mapping[str, object] = field(default_factory=dict)
    at: Literal["linears", "norms", ""] = "linears"
    drops: str | None = None

    def configured(self, model: Model, dropout: float) -> peft.PeftConfig:
        """The config for a model."""
        options = {**self.options, "task_type": model.task}
        if self.at:
            options["target_modules"] = list(getattr(model, self.at))
        if self.config is peft.IA3Config:
            options["feedforward_modules"] = [model.linears[-1]]
        if self.drops:
            options[self.drops] = dropout
        return self.config(**options)


_BUDGET = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS}
_SOFT = {"num_virtual_tokens": 4}
METHODS = (
    Method("LoRA", peft.LoraConfig, {"r": 4}, drops="lora_dropout"),
    Method("DoRA", peft.LoraConfig, {"r": 4, "use_dora": True}, drops="lora_dropout"),
    Method("AdaLoRA", peft.AdaLoraConfig, _BUDGET, drops="lora_dropout"),
    Method("IA3", peft.IA3Config),
    Method("VeRA", peft.VeraConfig, {"r": 6}, drops="vera_dropout"),
    Method("LN tuning", peft.LNTuningConfig, at="norms"),
    Method("Prompt tuning", peft.PromptTuningConfig, _SOFT, at=""),
    Method("P-tuning, MLP", peft.PromptEncoderConfig, {**_SOFT, "encoder_hidden_size": 24}, at=""),
    Method(
        "P-tuning, LSTM",
        peft.PromptEncoderConfig,
        {**_SOFT, "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
        at="",
        drops="encoder_dropout",
    ),
    Method("Prefix tuning", peft.PrefixTuningConfig, _SOFT, at=""),
    Method(
        "Prefix tuning, projected",
        peft.PrefixTuningConfig,
        {**_SOFT, "prefix_projection": True, "encoder_hidden_size": 24},
        at="",
    ),
)
MODELS = (DECODER, ENCODER, FEATURES, BOTH)


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of two trained adapters, and of the losses on the way; or why there is none."""

    adapter: float = 0.0
    loss: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        return self.reason or f"{self.adapter:.1e}"


def compare(method: Method, model: Model, dropout: float) -> Difference:
    """Train both for ten steps."""
    base = model.make(dropout)
    theirs = peft.get_peft_model(copy.deepcopy(base), method.configured(model, dropout))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    with tempfile.TemporaryDirectory() as directory:
        ours = same_start(theirs, base, Path(directory) / "start")
        try:
            want = train(theirs, model.batches(base))
        except Exception as error:
            return Difference(reason=f"`peft` raises {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        got = train(ours, model.batches(base))
        loss = float(torch.tensor([abs(a - b) / abs(b) for a, b in zip(got, want, strict=True)]).max())
        tensors = []
        for name, trained in (("ours", ours), ("theirs", theirs)):
            trained.save_pretrained(str(Path(directory) / name))  # type: ignore[operator]
            tensors.append(load_file(Path(directory) / name / "adapter_model.safetensors"))
    return Difference(distance(*tensors), loss)


def same_start(theirs: nn.Module, base: nn.Module, directory: Path) -> AdaptedModel:
    """Our model of a base with the adapter that `peft` has; networks, which files do not hold, are copied."""
    theirs.save_pretrained(str(directory))  # type: ignore[operator]
    ours = peftfx.load(base, directory)
    networks = getattr(theirs, "prompt_encoder", None)
    state = {} if networks is None else networks["default"].state_dict()
    if len(state) > 1:  # more than an embedding
        ours.remove()
        rule = theirs.peft_config["default"]  # type: ignore[index]
        heads = {n.removeprefix("saved."): t for n, t in peftfx_heads(directory, base)}
        ours.add_adapter("default", rule)
        own = dict(ours.adapter("default").tensors())
        with torch.no_grad():
            for name, value in state.items():
                own[f"sequence.{name.replace('.', '_')}"].copy_(value)
            for name, value in heads.items():
                own[f"saved.{name}"].copy_(value)
    return ours


def peftfx_heads(directory: Path, base: nn.Module) -> list[tuple[str, Tensor]]:
    """The heads in a saved adapter."""
    loaded = peftfx.load(base, directory)
    found = [(n, t.detach().clone()) for n, t in loaded.adapter("default").tensors() if n.startswith("saved.")]
    loaded.remove()
    return found


def train(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """The losses of AdamW steps, one a batch; each step's random draws have a seed of their own."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        output = model(**batch)
        loss = output.loss if "loss" in output else output.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        allocate(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def allocate(model: nn.Module, step: int) -> None:
    """Give out rank budgets, where there are any."""
    owner = model if isinstance(model, AdaptedModel) else model.base_model
    rules = model.adapter("default").rules if isinstance(model, AdaptedModel) else [model.peft_config["default"]]
    if any(hasattr(rule, "target_r") for rule in rules):
        owner.update_and_allocate(step)


def distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, each relative to its tensor's largest value."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    far = [(got[n] - t).abs().max() / t.abs().max() for n, t in want.items() if t.numel()]
    return float(torch.stack(far).max())  # NaN if one is, where Python's `max` would lose it


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[m.name for m in METHODS], help="one method alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| method | model | without dropout | with dropout |\n| --- | --- | --- | --- |")
    for method in METHODS:
        for model in MODELS:
            if args.method in (None, method.name):
                cells = [str(compare(method, model, dropout)) for dropout in (0.0, DROPOUT)]
                print(f"| {method.name} | {model.name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{date.today()}; {', '.join(f'{n} {v}' for n, v in versions().items())}", file=sys.stderr)


if __name__ == "__main__":
    main()
