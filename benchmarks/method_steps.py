"""The training step of each method against HF PEFT's: `python benchmarks/method_steps.py [METHODS]`.

One small LLaMA, the methods where they act by default, forward and backward in turn, in seconds of this process: what
else the machine does is not counted. Of each side the least of the repeats; a ratio above 1.05 is marked.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers as hf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from method_table.cells import OPTIONS, kinds

import peftfx
from peftfx.methods import method_named

REPEATS, BATCH, LENGTH = 8, 4, 96
LIMIT = 1.05  #: what a step may cost, as HF PEFT's is 1
SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


def base() -> nn.Module:
    """The model, of random weights."""
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=512, **SIZE)).eval()


def seconds(step: Callable[[], object]) -> float:
    """Of this process, one step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def steps(kind: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step here, and in HF PEFT, of a method with the same adapter."""
    ids = torch.randint(512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    ours = peftfx.transform(base(), method_named(kind).from_options(OPTIONS.get(kind, {})), inputs={"input_ids": ids})
    options = {n: list(v) if isinstance(v, tuple) else v for n, v in vars(ours.peft_config["default"]).items()}
    config = peft.get_peft_config({**options, "inference_mode": False})
    theirs = peft.get_peft_model(base(), config)
    (method,) = ours.adapter("default").rules
    beside = {name: torch.zeros(BATCH, dtype=torch.long) for name in method.inputs}
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **({} if kind == "CPT" else {"labels": ids})}
    return tuple(_step(model, {**call, **beside}) for model in (ours.train(), _called(theirs.train(), kind)))  # type: ignore[return-value]


def _called(theirs: nn.Module, kind: str) -> nn.Module:
    return theirs.base_model if kind == "POLY" else theirs  # type: ignore[return-value]


def _step(model: nn.Module, call: dict[str, Tensor]) -> Callable[[], object]:
    def step() -> None:
        output = model(**call)
        loss = output.loss if output.loss is not None else output.logits.square().mean()
        loss.backward()

    return step


def rows(chosen: list[str]) -> Iterator[str]:
    """A row of the table for each method."""
    for kind in chosen:
        try:
            own, others = steps(kind)
            own(), others()
            pairs = [(seconds(own), seconds(others)) for _ in range(REPEATS)]
        except Exception as error:  # of any kind: HF PEFT stops at some, and the row says so
            yield f"| {kind} | | | {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]} |"
            continue
        mine, theirs = (min(side) for side in zip(*pairs, strict=True))
        mark = "" if mine / theirs <= LIMIT else " !"
        yield f"| {kind} | {1000 * mine:.1f} | {1000 * theirs:.1f} | {mine / theirs:.2f}{mark} |"


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| method | here, ms | HF PEFT, ms | ratio |\n| --- | --- | --- | --- |")
    for row in rows(sys.argv[1:] or kinds()):
        print(row, flush=True)


if __name__ == "__main__":
    main()
