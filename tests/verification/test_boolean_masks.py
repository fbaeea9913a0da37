"""A model that takes a boolean mask is verified with masks that show each token something, as its example does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.query(x)[:, None]
        return self.out(F.scaled_dot_product_attention(heads, x[:, None], x[:, None], attn_mask=mask)[:, 0])


def causal(length: int) -> Tensor:
    return torch.ones(1, 1, length, length).tril().bool()


def test_a_causal_mask_of_a_users_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="query", init_lora_weights=False), inputs=call(2, 5))
    report = adapted.export(tmp_path / "out")
    told = "the model takes a size of 1 there, too; this export does not"  # torch repeats a mask of one column
    assert f"mask.3 = x.1 ({told})" in report.sizes
    other = call(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(tmp_path / "out")(**other)["output"], adapted(**other), atol=1e-5, rtol=0)


def call(batch: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, 8), "mask": causal(length)}
