"""What it costs to adapt a model too large to hold: `peftfx.transform` under FakeTensorMode, `peft` on the meta device.

    python benchmarks/transform.py [--layers 32]

Each runs in a process of its own; times are CPU seconds beyond imports, memory is the peak beyond imports. The captured
graph is what `peft` does not make; the row "adapted graph" is the part that grows with the adapter.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

CONFIG = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def peak() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_peftfx(layers: int) -> dict[str, float]:
    """CPU seconds of each step, and the peak."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    import peftfx
    import peftfx.model.api
    from peftfx.passes import Merge

    start, rows = peak(), {}
    clock = stopwatch(rows)
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_hidden_layers=layers)).eval()
    clock("build the model")
    adapted = peftfx.transform(model, peftfx.LoRA(r=8, target="all-linear"))
    clock("transform: capture, sites, parameters")
    graph = adapted.graph()
    clock("adapted graph")
    Merge()(graph)
    clock("merged graph")
    rows["parameters of the adapter"] = adapted.get_nb_trainable_parameters()[0]
    rows["peak MB"] = peak() - start
    return rows


def run_peft(layers: int) -> dict[str, float]:
    """CPU seconds of each step, and the peak."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    start, rows = peak(), {}
    clock = stopwatch(rows)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_hidden_layers=layers))
        clock("build the model")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    clock("get_peft_model")
    rows["parameters of the adapter"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    rows["peak MB"] = peak() - start
    return rows


def stopwatch(rows: dict[str, float]) -> Callable[[str], None]:
    """Each call notes the CPU seconds since the call before."""
    last = [time.process_time()]

    def note(name: str) -> None:
        now = time.process_time()
        rows[f"{name}, CPU s"] = now - last[0]
        last[0] = now

    return note


def main() -> None:
    """Run both, each in a fresh process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", choices=["peftfx", "peft"])
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"peftfx": run_peftfx, "peft": run_peft}[args.only](args.layers)))
        return
    from rich.console import Console
    from rich.table import Table

    for name in ("peftfx", "peft"):
        command = [sys.executable, __file__, "--only", name, "--layers", str(args.layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        table = Table("step", "value", title=f"{name}, LLaMA with {args.layers} layers, LoRA r=8 on all linears")
        for step, value in json.loads(done.stdout.strip().splitlines()[-1]).items():
            table.add_row(step, f"{value:,.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
