"""A method of another package: trained, saved, loaded and exported, by its name alone. `python use.py OUT`."""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import peftfx

if len(sys.argv) != 2:
    sys.exit("python use.py OUT, a directory to make")
OUT = Path(sys.argv[1])
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
torch.manual_seed(0)
base = BertModel(BertConfig(vocab_size=64, **SIZE)).eval()
ids, target = torch.randint(64, (4, 9)), torch.randn(4, 9, 32)

adapted = peftfx.transform(base, "row_scale@attention.value | mlp.up")
optimizer = torch.optim.Adam(adapted.adapters.parameters(), lr=0.05)
losses = []
for _ in range(20):
    loss = (adapted(input_ids=ids).last_hidden_state - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0]

want = adapted(input_ids=ids).last_hidden_state.detach()
adapted.save_pretrained(OUT / "adapter")
adapted.remove()
again = peftfx.load(base, OUT / "adapter")
torch.testing.assert_close(again(input_ids=ids).last_hidden_state, want)
report = again.export(OUT / "onnx")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; exported and verified:")
print(report)
