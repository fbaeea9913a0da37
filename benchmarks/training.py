"""What a step of training costs here and in `peft`: seconds, and the peak of memory, as ratios of one run.

    python benchmarks/training.py [--row ROW] [--pairs 15]

Prints a Markdown table. The two models have the same weights, adapter and batch, and step in turns, so that what else
runs slows both; a ratio is the median over pairs of steps. A step is forward, backward and AdamW. Memory is the most
that torch has allocated in a step beyond what it had before: activations, gradients and temporaries. It is measured
behind the timed steps, because a profiler leaves memory to its process.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

import peft
import torch
import transformers as hf
from measure import versions
from ten_steps import Method, Model, same_start
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from peftfx.bases.example_inputs import example_inputs

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
BATCH = {"batch": 4, "sequence": 32}
VOCABULARY, WARM_UP, RATE = 4000, 2, 1e-3


def llama(dropout: float) -> nn.Module:
    """A decoder with grouped heads."""
    config = hf.LlamaConfig(**SIZES, vocab_size=VOCABULARY, num_key_value_heads=4, attention_dropout=dropout)
    return hf.LlamaForCausalLM(config)


def bert(dropout: float) -> nn.Module:
    """An encoder without a head: `peft` has no prefixes for one with."""
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertModel(hf.BertConfig(**SIZES, vocab_size=VOCABULARY, **drops))


def models(ends: Sequence[str], others: Sequence[str]) -> tuple[Model, Model]:
    """Both models, with these modules as a method's targets."""
    return (
        Model("LLaMA", llama, "CAUSAL_LM", tuple(ends), ("norm", "layernorm")),
        Model("BERT", bert, "FEATURE_EXTRACTION", tuple(others), ("LayerNorm",)),
    )


_ATTENTION = models(("q_proj", "v_proj"), ("query", "value"))
_ALL = models(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
)
_SCALED = models(("k_proj", "v_proj", "down_proj"), ("key", "value", "output.dense"))
_SOFT = {"num_virtual_tokens": 16}
ROWS: Mapping[str, tuple[Method, tuple[Model, Model]]] = {
    "LoRA, queries and values": (Method("LoRA", peft.LoraConfig, {"r": 8}), _ATTENTION),
    "LoRA, all linears": (Method("LoRA", peft.LoraConfig, {"r": 8}), _ALL),
    "LoRA, all linears, dropout": (Method("LoRA", peft.LoraConfig, {"r": 8}, drops="lora_dropout"), _ALL),
    "DoRA, all linears": (Method("DoRA", peft.LoraConfig, {"r": 8, "use_dora": True}), _ALL),
    "IA3": (Method("IA3", peft.IA3Config), _SCALED),
    "Prompt tuning": (Method("Prompt tuning", peft.PromptTuningConfig, _SOFT, at=""), _SCALED),
    "Prefix tuning": (Method("Prefix tuning", peft.PrefixTuningConfig, _SOFT, at=""), _SCALED),
}


@dataclass
class Cost:
    """What the steps of one model cost: seconds on the clock and seconds of CPU of each, and bytes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: int = 0


def compare(method: Method, model: Model, pairs: int) -> tuple[Cost, Cost]:
    """What steps cost in peftfx and in `peft`."""
    dropout = 0.1 if method.drops else 0.0
    base = model.make(dropout)
    theirs = peft.get_peft_model(copy.deepcopy(base), method.configured(model, dropout))
    with tempfile.TemporaryDirectory() as directory:
        ours = same_start(theirs, base, Path(directory))
    batch = example_inputs(base, sizes=BATCH, labels=model.task == "CAUSAL_LM")
    steps = [stepper(ours, batch), stepper(theirs, batch)]
    found = [Cost(), Cost()]
    for turn in range(WARM_UP + pairs):
        for which in (0, 1) if turn % 2 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            steps[which]()
            if turn >= WARM_UP:
                found[which].wall.append(time.perf_counter() - wall)
                found[which].cpu.append(time.process_time() - cpu)
    for cost, step in zip(found, steps, strict=True):
        cost.memory = peak(step)
    return found[0], found[1]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over pairs of steps."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def stepper(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """A step of training of a model on a batch, with the optimizer that transformers' `Trainer` takes by default."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)

    def step() -> None:
        output = model(**batch)
        loss = output.loss if "loss" in output else output.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(step: Callable[[], None]) -> int:
    """The most bytes that torch has allocated in a step, beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = held = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS), action="append", help="of these methods alone")
    parser.add_argument("--pairs", type=int, default=15, help="how many steps of each")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| | model | ms, `peft` | ms, peftfx | wall | CPU | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.row or ROWS:
        method, both = ROWS[name]
        for model in both:
            ours, theirs = compare(method, model, args.pairs)
            times = [f"{1e3 * median(cost.wall):.0f}" for cost in (theirs, ours)]
            ratios = (ratio(ours.wall, theirs.wall), ratio(ours.cpu, theirs.cpu), ours.memory / theirs.memory)
            print(f"| {' | '.join([name, model.name, *times, *(f'{r:.2f}' for r in ratios)])} |", flush=True)
    print(f"\n{date.today()}; {', '.join(f'{n} {v}' for n, v in versions().items())}", file=sys.stderr)


if __name__ == "__main__":
    main()
