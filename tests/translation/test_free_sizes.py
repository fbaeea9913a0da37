"""Code that uses a size where torch takes a number: the axis stays free, and every size is torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel


def _turned(x: Tensor, *, align_corners: bool) -> Tensor:
    """The values at the places that a matrix maps places to."""
    theta = torch.tensor([[0.8, -0.3, 0.1], [0.2, 1.1, -0.2]]).expand(x.shape[0], -1, -1)
    grid = nn.functional.affine_grid(theta, list(x[:, None].shape), align_corners=align_corners)
    return nn.functional.grid_sample(x[:, None], grid, align_corners=align_corners)


CODE: dict[str, Callable[[Tensor], Tensor]] = {
    "linspace": lambda x: x * torch.linspace(-1, 3, steps=x.shape[1])[:, None],
    "linspace of a dtype": lambda x: x * torch.linspace(0, 1, x.shape[1], dtype=torch.float64).float()[:, None],
    "grid between corners": lambda x: _turned(x, align_corners=True),
    "grid between middles": lambda x: _turned(x, align_corners=False),
    "grid of points in space": lambda x: nn.functional.affine_grid(
        torch.eye(3, 4).expand(x.shape[0], -1, -1) * x[:, :1, :1], (x.shape[0], 1, 2, x.shape[1], 3)
    ),
    "roll": lambda x: torch.roll(x, x.shape[1] // 2, 1),
    "roll back, over two axes": lambda x: x.roll((-(x.shape[1] // 2), 1), dims=(1, 2)),
    "roll flat": lambda x: torch.roll(x, x.shape[1]),
    "rest of whole numbers": lambda x: x + (torch.arange(20) % x.shape[1]).float().sum(),
    "rest of floats": lambda x: torch.remainder(10 * x, x.shape[1]),
    "whole numbers times a ratio": lambda x: x * (torch.arange(3) * (7 / x.shape[1])).sum(),
    "whole numbers minus a ratio": lambda x: x * (torch.arange(3) - x.shape[1] / 2).sum(),
    "to the power of a ratio": lambda x: x.abs() ** (x.shape[1] / 7),
    "rest by a ratio": lambda x: (3 * x) % (x.shape[1] / 7),
    "root": lambda x: x / math.sqrt(x.shape[1]),
    "rounded half": lambda x: x[:, : round(x.shape[1] / 2)],
    "along an axis": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
    "along an axis, by the same places": lambda x: x.take_along_dim(x[:1, :, :1].argsort(1), dim=1),
    "along no axis": lambda x: torch.take_along_dim(x, x[:1].argsort(1)),
    "max_pool1d": lambda x: F.max_pool1d(x.transpose(1, 2), 2),
    "max_pool1d, padded": lambda x: F.max_pool1d(x.transpose(1, 2), 3, 2, padding=1),
    "max_pool1d, ceil": lambda x: F.max_pool1d(x.transpose(1, 2), 3, 2, ceil_mode=True),
    "max_pool1d, dilated": lambda x: F.max_pool1d(x.transpose(1, 2), kernel_size=(2,), stride=(1,), dilation=2),
    "places of max_pool1d": lambda x: F.max_pool1d(x.transpose(1, 2), 2, return_indices=True)[1].float(),
}


class Code(nn.Module):
    """A layer, and one line of code."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.code = nn.Linear(4, 4), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.layer(x))


@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
@torch.no_grad()
def test_it_is_exported_for_all_sizes(code: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Code(code)
    rules = peftfx.LoRA(r=2, target_modules=["layer"], init_lora_weights=False)
    adapted = peftfx.transform(base, rules, inputs={"x": torch.randn(2, 9, 4)}).eval()
    report = adapted.export(tmp_path / "out")
    assert report.inputs["x"][1] == "x.1"
    served = OnnxModel(tmp_path / "out")
    for batch, length in ((1, 5), (3, 8), (2, 17)):
        x = torch.randn(batch, length, 4)
        torch.testing.assert_close(served(x=x)["output"], adapted(x), atol=1e-5, rtol=1e-5)
