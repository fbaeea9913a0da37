"""A served model takes tables and lists of tensors as the model's own code does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import peftfx


class Nested(nn.Module):
    """A model of a table in which there is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: dict[str, object], weight: Tensor) -> Tensor:
        first, second = batch["views"]  # type: ignore[misc]
        return (self.layer(first) + self.layer(second)) * weight + batch["shift"]


def _call(rows: int) -> dict[str, object]:
    views = [torch.randn(rows, 4), torch.randn(rows, 4)]
    return {"batch": {"views": views, "shift": torch.randn(rows, 3)}, "weight": torch.randn(rows, 1)}


def test_tables_and_lists_are_taken_apart(tmp_path: Path) -> None:
    model = Nested().eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs=_call(2))
    served, call = peftfx.runtime.load(tmp_path / "out"), _call(3)
    torch.testing.assert_close(served(**call)["output"], model(**call).detach(), atol=1e-5, rtol=1e-5)
    by_name = {"batch.views.0": call["batch"]["views"][0], "batch.views.1": call["batch"]["views"][1]}  # type: ignore[index]
    by_name |= {"batch.shift": call["batch"]["shift"], "weight": call["weight"]}  # type: ignore[index]
    torch.testing.assert_close(served(**by_name)["output"], model(**call).detach(), atol=1e-5, rtol=1e-5)


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, pair: Pair) -> Tensor:
        return self.layer(pair.one) - self.layer(pair.other)


def test_named_tuples_are_taken_apart(tmp_path: Path) -> None:
    model = OfPairs().eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"pair": Pair(torch.randn(2, 4), torch.randn(2, 4))})
    served, pair = peftfx.runtime.load(tmp_path / "out"), Pair(torch.randn(3, 4), torch.randn(3, 4))
    torch.testing.assert_close(served(pair=pair)["output"], model(pair).detach(), atol=1e-5, rtol=1e-5)
