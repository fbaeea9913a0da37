"""What it costs to see, in each call, that a model is still what its graphs were captured from.

    python benchmarks/staleness.py

Prints the microseconds of one look, and its share of a step of training, of a BERT of 2 layers with hidden size 256.
"""

from __future__ import annotations

import timeit

import torch
import transformers as hf
from measure import versions

import peftfx
from peftfx.model.graphs.fingerprints import ModelState


def main() -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    size = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    model = hf.BertModel(hf.BertConfig(vocab_size=64, **size)).eval()
    adapted = peftfx.transform(model, peftfx.LoRA(target="attention.query"))
    ids = torch.randint(64, (8, 64))

    def step() -> None:
        adapted(input_ids=ids).last_hidden_state.sum().backward()

    step()
    state = ModelState(model)
    look, whole = (min(timeit.repeat(run, number=n, repeat=7)) / n for run, n in ((state.holds, 200), (step, 5)))
    print(f"a look: {look * 1e6:.1f} us, {look / whole:.2%} of a step of training of {whole * 1e3:.1f} ms")
    print(", ".join(f"{package} {number}" for package, number in versions().items()))


if __name__ == "__main__":
    main()
