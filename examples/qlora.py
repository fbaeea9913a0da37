"""QLoRA on a CPU: train an adapter on a base in nf4, save it, export it three ways, and compare them.

As it is: the base's codes, and the adapter beside them. Merged: in float32. Merged and rounded again: in int4.

python examples/qlora.py OUT [DIRECTORY]

DIRECTORY is a causal language model of transformers'; without one a tiny, random LLaMA is trained. It needs
bitsandbytes: pip install "peftfx[qlora]".
"""

import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx.export import OnnxModel

if find_spec("bitsandbytes") is None:
    sys.exit('this example quantises its base by bitsandbytes, which is not installed: pip install "peftfx[qlora]"')

import bitsandbytes as bnb

torch.set_num_threads(1)
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())


def in_nf4(linear: torch.nn.Linear) -> bnb.nn.Linear4bit:
    """The layer in 4 bits: on a CPU as on a GPU, it is quantised when it is moved to its device."""
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = linear.bias
    return made.to("cpu")


# `from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))` gives such a base as well.
torch.manual_seed(0)
if len(sys.argv) > 2:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
else:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **size))
for path, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
        model.set_submodule(path, in_nf4(module))

adapted = peftfx.transform(model, peftfx.LoRA(r=8, target="all-linear"), seed=0).train()
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(3, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
losses = []
for _ in range(10):
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")

adapted.save_pretrained(out / "adapter")

adapted.eval()
with torch.no_grad():
    exact = adapted.floating()(input_ids=ids).logits


def perplexity(logits: torch.Tensor) -> float:
    """Of the text that was trained on."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


# The first has the base's codes as they are: nothing is rounded a second time. It is what was trained.
ways = {"as it is": {}, "merged": {"merge": True}, "merged, int4": {"merge": True, "quantize": "int4"}}
print(f"in torch: perplexity {perplexity(exact):.3f}")
far = {}
for way, options in ways.items():
    directory = out / way.replace(", ", "-").replace(" ", "-")
    report = adapted.export(directory, view="forward", **options)
    served = OnnxModel(directory)
    logits = served(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    start, rounds = time.perf_counter(), 20
    for _ in range(rounds):
        served(input_ids=ids, attention_mask=torch.ones_like(ids))
    speed = rounds * ids.numel() / (time.perf_counter() - start)
    far[way] = float((logits - exact).abs().max())
    print(
        f"{way}: perplexity {perplexity(logits):.3f}, logits up to {far[way]:.1e} off, "
        f"{report.bytes['model.onnx.data']:,} B of weights, {speed:,.0f} tokens/s"
    )
assert far["as it is"] < 1e-4 * float(exact.abs().max())
assert far["merged"] < 1e-4 * float(exact.abs().max())
assert far["merged, int4"] > 10 * far["as it is"]

# In Python, merged, the adapted layers are in floating point; the report says what that rounds.
print(adapted.merge())
print(out)
