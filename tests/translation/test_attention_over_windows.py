"""Attention with several axes before the heads, as code makes it that attends within windows of an image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftfx
from peftfx.export import OnnxModel

pytestmark = pytest.mark.further

HEADS = 2


class Windows(nn.Module):
    """Attention of [batch, windows, length, 8] within each window."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, 4)).transpose(2, 3) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.of(x), is_causal=self.mask == "causal")
        return self.out(y.transpose(2, 3).flatten(-2))

    def of(self, x: Tensor) -> Tensor | None:
        length = x.shape[2]
        past = torch.ones(length, length, dtype=torch.bool).tril()
        if self.mask == "of all":
            return past
        if self.mask == "of heads":
            return torch.stack([past, past.mT])
        if self.mask == "of windows":
            return (x[0, :, None, :, :1] > 0).mT | past  # [windows, 1, length, length]
        if self.mask == "of rows":
            return (x[..., :1] > 0).mT[:, :, None] | past
        return None


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "causal", "of all", "of heads", "of windows", "of rows"])
def test_it_is_as_in_torch_for_other_sizes(mask: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = peftfx.transform(Windows(mask).eval(), peftfx.LoRA(r=2, target="all-linear"), inputs={"x": windows(2)})
    for parameter in adapted.adapters.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.eval().export(tmp_path / "out")
    served = OnnxModel(tmp_path / "out")
    for x in (windows(2), windows(1, 4, 7), windows(3, 1, 1)):
        torch.testing.assert_close(served(x=x)["output"], adapted(x), rtol=1e-4, atol=1e-4)


def windows(batch: int, count: int = 3, length: int = 5) -> Tensor:
    return torch.randn(batch, count, length, 8)
