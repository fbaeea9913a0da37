"""A torch module of your own, its attention written with softmax: roles come from its dataflow, not from its names."""

import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel

torch.manual_seed(0)
torch.set_num_threads(1)
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())


class Tagger(nn.Module):
    """Tags each word; every name in it is meaningless on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Embedding(50, 32)
        self.n = nn.Conv1d(32, 32, 3, padding=1)
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.e, self.f = nn.Linear(32, 64), nn.Linear(64, 32)
        self.g = nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        x = self.w(words)
        x = x + self.n(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.a, self.b, self.c))
        weights = (query @ key.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
        x = x + self.d((weights @ value).transpose(1, 2).flatten(2))
        return self.g(x + self.f(nn.functional.gelu(self.e(x))))


# The model's own code says nothing of its inputs: one call's arguments do. Only their dtypes and sizes matter.
model = Tagger().eval()
words = torch.randint(50, (2, 7))
sites = peftfx.inspect(model, inputs={"words": words})
print(sites)
assert [site.path for site in sites.filter(role="attention.query")] == ["a"]
assert sites.by_path("f").role == "mlp.down"

rule = peftfx.LoRA(r=4, init_lora_weights=False, target="attention.query | attention.value | mlp | conv")
adapted = peftfx.transform(model, rule, inputs={"words": words}, seed=0)
print("adapted:", ", ".join(placement.key for placement in adapted.adapter("default").placements))

adapted.export(out / "onnx", force=True)
unseen = torch.randint(50, (5, 13))
served = OnnxModel(out / "onnx")(words=unseen)
(logits,) = served.values()
with torch.no_grad():
    torch.testing.assert_close(logits, adapted(unseen), atol=1e-4, rtol=1e-4)
print(f"ONNX Runtime = torch at {list(unseen.shape)}, an unseen shape")
