"""Code that fills up a last block that is not whole: one graph serves sizes with a rest and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel
from peftfx.export.verification.sizes.limits import OneSidedError

BLOCK = 4


class Blocks(nn.Module):
    """Attention within blocks, of which the last may be filled up; what was added is hidden."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        rest = size % BLOCK
        if rest > 0:
            x = F.pad(x, (0, 0, 0, BLOCK - rest))
        blocks = self.layer(x).unflatten(1, (-1, BLOCK))
        scores = blocks @ blocks.transpose(-1, -2)
        if rest > 0:
            hidden = torch.ones(BLOCK, dtype=torch.bool)
            hidden[:rest] = False
            last = scores[:, -1:].masked_fill(hidden, -1e4)
            scores = torch.cat([scores[:, :-1], last], 1)
        return (scores.softmax(-1) @ blocks).flatten(1, 2)[:, :size]


class Other(nn.Module):
    """What a whole block gives is no special case of what a filled one gives."""

    def forward(self, x: Tensor) -> Tensor:
        rest = x.shape[1] % BLOCK
        return x * 2 + rest if rest > 0 else x * 3


def test_a_graph_takes_whole_blocks_too(tmp_path: Path) -> None:
    model = Blocks().eval()
    report = peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 7, 6)})
    assert not any("%" in line for line in report.sizes)
    served = OnnxModel(tmp_path / "out")
    for size in (1, 4, 5, 8, 12, 13):
        x = torch.randn(3, size, 6)
        torch.testing.assert_close(next(iter(served(x=x).values())), model(x), atol=1e-5, rtol=1e-5)


def test_another_program_for_whole_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OneSidedError, match=r"% 4 > 0"):
        peftfx.export_onnx(Other().eval(), tmp_path / "out", inputs={"x": torch.randn(2, 7, 6)})
