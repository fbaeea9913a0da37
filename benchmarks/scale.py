"""What training costs on each road and in `peft`, in one process: seconds and memory of a step, as ratios of one run.

    python benchmarks/scale.py [--lengths 32 256 512] [--row TEXT] [--pairs 15] [--batch 4] [--width 256] [--layers 8]
                               [--threads N]

Prints a Markdown table. A row's models have the same weights, adapter and batch, and step in turns, so that what else
runs slows all; a ratio to `peft` is the median over rounds: of seconds on the clock, and of CPU seconds, which other
work on the machine changes less. A step is forward, backward and AdamW. Memory is the most that torch has allocated
in a step beyond what it had before. It is measured behind the timed steps, and each row and length has a process of its
own: a profiler leaves memory to its process, which takes less time to use than new memory, and so would favour a model
that takes more. `equal` says whether the loss and every gradient, by its name, are `peft`'s. In the row of generation,
a step is a `generate` of 16 tokens behind each text, and `equal` says whether the tokens are. The floor is a step of
`peft` with one LoRA, at the first layer's queries: what the base itself costs, forward and backward.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers as hf
from measure import versions
from torch import Tensor, nn
from training import Cost, peak, ratio, stepper

import peftfx
from peftfx.bases.example_inputs import example_inputs

LAYERS, WIDTH, VOCABULARY, BATCH, WARM_UP = 8, 256, 4000, 4, 2
WRITTEN = 16  #: tokens that a `generate` writes behind each text
FLOOR = "floor"  #: the name of the base with one LoRA among the roads
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINT = {"use_reentrant": False}


@dataclass(frozen=True)
class Row:
    """A method, whether layers are checkpointed, and whether the models generate; otherwise they train."""

    name: str
    options: Mapping[str, object]
    checkpointed: bool = False
    generates: bool = False


ROWS = (
    Row("LoRA, queries and values", {"target_modules": ["q_proj", "v_proj"]}),
    Row("LoRA, all linears", {"target_modules": LINEARS}),
    Row("LoRA, all linears, checkpointed", {"target_modules": LINEARS}, checkpointed=True),
    Row("DoRA, all linears", {"target_modules": LINEARS, "use_dora": True}),
    Row("LoRA, all linears, generation", {"target_modules": LINEARS}, generates=True),
)


def base(layers: int, width: int) -> nn.Module:
    """A decoder with grouped heads."""
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, vocab_size=VOCABULARY)
    )


def contenders(row: Row, model: nn.Module) -> dict[str, nn.Module]:
    """One base and adapter in `peft`, and on each of our roads."""
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, **row.options))  # type: ignore[arg-type]
    made: dict[str, nn.Module] = {"peft": theirs}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # at zero, the gradients of A are zero too, and any would be equal
                parameter.normal_(std=0.02)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        for road in ("modules",) if row.checkpointed else ("modules", "graph"):
            made[road] = peftfx.load(copy.deepcopy(model), Path(directory), road=road)
    for each in made.values() if row.checkpointed else ():
        each.gradient_checkpointing_enable(CHECKPOINT)  # type: ignore[operator]
        if each is theirs:
            each.enable_input_require_grads()  # type: ignore[operator]
    return made


def least(model: nn.Module) -> nn.Module:
    """The base with one LoRA in `peft`: gradients pass through the whole base, and nothing else is computed."""
    config = peft.LoraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[0])
    return peft.get_peft_model(copy.deepcopy(model), config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model by the names that its adapter's parameters have here."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for part in ("base_model.model.", "adapters.default.", ".default", ".weight"):
                name = name.replace(part, "")
            found[name] = parameter.grad.clone()
    return found


def are_equal(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> bool:
    """Whether a step has the same loss and gradients, each by its name, in all of them."""
    found = []
    for model in models.values():
        loss = model.train()(**batch).loss
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
        model.zero_grad()
    want = found[0]
    scale = max(float(value.abs().max()) for name, value in want.items() if name != "loss")
    return all(
        got.keys() == want.keys()
        and all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-5 * scale) for name in want)
        for got in found[1:]
    )


def writer(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Return a function that generates tokens behind the texts of a batch, and returns all."""
    texts = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    count = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    return lambda: model.eval().generate(**texts, **count)  # type: ignore[operator]


def measure(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """What steps of models cost, in turns: in a drawn order, because a model that steps twice in a row is faster."""
    found = {name: Cost() for name in steps}
    draw = random.Random(0)
    for turn in range(WARM_UP + rounds):
        for name in draw.sample(list(steps), len(steps)):
            start, worked = time.perf_counter(), time.process_time()
            steps[name]()
            if turn >= WARM_UP:
                found[name].wall.append(time.perf_counter() - start)
                found[name].cpu.append(time.process_time() - worked)
    for name, step in steps.items():
        found[name].memory = peak(step)
    return found


def lines(row: Row, length: int, rounds: int, *, texts: int, layers: int, width: int, threads: int) -> list[str]:
    """The lines of a row at one length, as Markdown; `texts` is the size of the batch."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = base(layers, width)
    batch = example_inputs(model, sizes={"batch": texts, "sequence": length}, labels=True)
    models = contenders(row, model)
    if row.generates:
        steps: dict[str, Callable[[], Any]] = {name: writer(model, batch) for name, model in models.items()}
        first, *others = [write() for write in steps.values()]
        same = all(first.equal(other) for other in others)
    else:
        same = are_equal(models, batch)
        floor = {} if row.checkpointed else {FLOOR: least(model)}
        steps = {name: stepper(model, batch) for name, model in {**models, **floor}.items()}
    costs = measure(steps, rounds)
    theirs = costs["peft"]
    return [
        f"| {row.name} | {length} | {name} | {1e3 * median(cost.wall):.0f} | {ratio(cost.wall, theirs.wall):.2f} "
        f"| {ratio(cost.cpu, theirs.cpu):.3f} "
        f"| {cost.memory / 2**20:.0f} | {cost.memory / theirs.memory:.3f} "
        f"| {'' if name == FLOOR else 'equal' if same else 'NOT EQUAL'} |"
        for name, cost in costs.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256, 512], help="tokens of a text")
    parser.add_argument("--row", default="", help="rows whose name has this")
    parser.add_argument("--pairs", type=int, default=15, help="how many steps of each")
    parser.add_argument("--batch", type=int, default=BATCH, help="texts of a batch")
    parser.add_argument("--width", type=int, default=WIDTH, help="the model's hidden size")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch's operations")
    args = parser.parse_args()
    sizes = {"texts": args.batch, "layers": args.layers, "width": args.width, "threads": args.threads}
    print("| | tokens | road | ms | time to `peft` | CPU to `peft` | MB | memory to `peft` | a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        for row in (row for row in ROWS if args.row in row.name):
            for length in args.lengths:
                print(*processes.submit(lines, row, length, args.pairs, **sizes).result(), sep="\n", flush=True)
    known = {"threads": args.threads, **versions()}
    print(f"\n{date.today()}; {', '.join(f'{n} {v}' for n, v in known.items())}", file=sys.stderr)


if __name__ == "__main__":
    main()
