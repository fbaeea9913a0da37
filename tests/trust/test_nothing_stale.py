"""Nothing stale: a capture leaves the model as it was, and a graph is used while what it was made from is the same."""

from __future__ import annotations

import copy

import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import peftfx
from peftfx.model.adapted import AdaptedModel


class Remembers(nn.Module):
    """A layer that keeps what it computes for the next call: in an attribute, a dict, a list, a buffer, an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.made, self.kept = nn.Linear(4, 4), {}, []
        self.notes = Notes()
        self.register_buffer("table", torch.ones(4))
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.table
        self.last = self.made["y"] = self.notes.y = y
        self.kept.append(y)
        self.register_buffer("table", torch.ones(4, device=x.device))
        self.new = y
        return y


class Notes:
    """An object that is no module."""

    y: object = None


def lora(model: nn.Module, target: str = "head", **inputs: Tensor) -> AdaptedModel:
    return peftfx.transform(model, peftfx.LoRA(r=2, target=target), inputs=inputs or None, seed=0)


def test_capture_leaves_every_attribute_as_it_was() -> None:
    model = Remembers()
    table = model.table
    adapted = lora(model, x=torch.zeros(2, 3, 4))
    adapted.eval()(torch.zeros(2, 3, 4))
    assert (model.last, model.made, model.kept, vars(model.notes)) == (None, {}, [], {})
    assert model.table is table
    assert not hasattr(model, "new")


def test_phi_3_with_long_rope_computes_the_same_after_a_capture_and_trains() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = hf.Phi3Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=1,
        rope_parameters=rope,
    )
    model = hf.Phi3ForCausalLM(config).eval()
    ids = torch.randint(4, 99, (2, 20))  # longer than the first of its two ranges
    want = copy.deepcopy(model)(input_ids=ids).logits
    adapted = lora(model, "attention.query")
    assert not any(isinstance(value, FakeTensor) for module in model.modules() for value in vars(module).values())
    torch.testing.assert_close(adapted(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(input_ids=ids).logits, want, atol=0, rtol=0)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())
