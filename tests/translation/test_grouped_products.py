"""Experts' grouped products in ONNX: torch's own numbers, for groups with many rows, one, and none."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel

GROUPS, K, N = 6, 5, 3


class Grouped(nn.Module):
    """Rows, sorted by group, and their products with the matrices of their groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(groups, K, N))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        groups = chosen % len(self.weight)
        ends = (groups[:, None] == torch.arange(len(self.weight))).sum(0).cumsum(0)
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(x[groups.argsort()], self.weight, ends.int())
        return product


def by_hand(model: Grouped, x: Tensor, chosen: Tensor) -> Tensor:
    return torch.cat([x[chosen == group] @ matrix for group, matrix in enumerate(model.weight)])


@pytest.mark.parametrize("groups", [1, GROUPS])
def test_each_row_meets_the_matrix_of_its_group(groups: int, tmp_path: Path) -> None:
    model = Grouped(groups).eval()
    example = {"x": torch.randn(8, K), "chosen": torch.randint(groups, (8,))}
    peftfx.export_onnx(model, tmp_path / "out", inputs=example)
    served = OnnxModel(tmp_path / "out")
    for counts in [[3], [1], [11]] if groups == 1 else [[2, 0, 3, 1, 0, 2], [0] * 5 + [5], [4] + [0] * 5, [1] * 6]:
        x, chosen = torch.randn(sum(counts), K), torch.arange(groups).repeat_interleave(torch.tensor(counts))
        (found,) = served(x=x, chosen=chosen).values()
        torch.testing.assert_close(found, by_hand(model, x, chosen))


def test_an_expert_takes_few_nodes(tmp_path: Path) -> None:
    example = {"x": torch.randn(8, K), "chosen": torch.randint(64, (8,))}
    peftfx.export_onnx(Grouped(64).eval(), tmp_path / "out", inputs=example)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert len(graph.node) < 3 * 64
