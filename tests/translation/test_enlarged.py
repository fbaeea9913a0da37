"""Enlargements by factors between 1 and 2: an axis of few values keeps its size, and is torch's all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx


class Enlarges(nn.Module):
    """A conv, and its picture enlarged: rows and columns by factors of their own."""

    def __init__(self, mode: str, factors: tuple[float, float], **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mode, self.factors, self.options = nn.Conv2d(3, 3, 1), mode, factors, options

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.conv(x), scale_factor=self.factors, mode=self.mode, **self.options)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("factors", [(1.25, 1.25), (1.15, 2.0)], ids=str)
@torch.no_grad()
def test_an_axis_that_keeps_its_size_is_torchs(mode: str, factors: tuple[float, float], tmp_path: Path) -> None:
    base = Enlarges(mode, factors).eval()
    peftfx.export_onnx(base, tmp_path / "out", inputs={"x": torch.randn(2, 3, 12, 12)})
    served = peftfx.runtime.load(tmp_path / "out")
    for size in ((10, 3), (3, 10), (3, 3), (1, 1), (6, 5), (4, 4)):
        x = torch.randn(2, 3, *size)
        (got,) = served(x).values()
        torch.testing.assert_close(torch.as_tensor(got), base(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_aligned_corners_go_by_the_sizes(tmp_path: Path) -> None:
    base = Enlarges("bilinear", (1.25, 1.25), align_corners=True).eval()
    peftfx.export_onnx(base, tmp_path / "out", inputs={"x": torch.randn(2, 3, 12, 12)})
    served = peftfx.runtime.load(tmp_path / "out")
    for size in ((10, 3), (3, 3), (7, 9)):
        x = torch.randn(2, 3, *size)
        (got,) = served(x).values()
        torch.testing.assert_close(torch.as_tensor(got), base(x), atol=1e-5, rtol=1e-4)
