"""Norms whose weight is a bare parameter of a larger module: graphs with slots are exported, and such norms swapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx import LNTuning, LoRA, PeftfxError


class Gains(nn.Module):
    """Two layers whose results are normalised, and scaled by a parameter that stands beside the layers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.gain = nn.Linear(4, 6), nn.Linear(6, 6), nn.Parameter(torch.rand(sizes) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * self.gain


def swapped(base: nn.Module, method: LNTuning | LoRA, root: Path) -> tuple[Tensor, Tensor]:
    """What a graph with slots and an adapter gives, and what the adapted model gives."""
    x = torch.randn(2, 4)
    peftfx.export_onnx(base, root / "graph", slots="all-linear", inputs={"x": x})
    adapted = peftfx.transform(base, method, inputs={"x": x}).eval()
    for parameter in adapted.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * parameter.requires_grad
    file = peftfx.export_adapter(adapted, root / "graph", root / "one")
    served = peftfx.runtime.load(root / "graph")
    served.set_adapter(served.load_adapter(file))
    more = torch.randn(3, 4)
    return torch.as_tensor(next(iter(served(more).values()))), adapted(more).detach()


@pytest.mark.parametrize(("method", "sizes"), [(LNTuning(), (6,)), (LoRA(r=2, target="all-linear"), ())])
def test_an_adapter_is_swapped(method: LNTuning | LoRA, sizes: tuple[int, ...], tmp_path: Path) -> None:
    got, want = swapped(Gains(*sizes).eval(), method, tmp_path)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_trained_number_has_no_slot(tmp_path: Path) -> None:
    """A file of ONNX Runtime's adapters holds no tensor without axes."""
    with pytest.raises(PeftfxError, match="the graph has no place for a trained copy of gain"):
        swapped(Gains().eval(), LNTuning(), tmp_path)
