"""A copied layer's tensors have memory of their own: code that writes into them writes into no other layer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel
from peftfx.views.capture import capture

pytestmark = pytest.mark.usefixtures("capture_each")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Windows(Layer):
    """Adds to each place the sum of a window of two, as LED's code reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y /= 2
        (batch, length, width), (row, place, last) = y.shape, y.stride()
        windows = y.as_strided((batch, length - 1, 2, width), (row, place, place, last))
        return x + nn.functional.pad(windows.sum(2), (0, 0, 0, 1))


class GivesViews(Layer):
    """Returns a view of what it was given, and two views of its own result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x).tanh()
        return x[:, 1:], y, y[:, 1:]


class Stack(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        for layer in self.layers:
            x = layer(x)
            if isinstance(x, tuple):
                given, y, part = x
                part += 1
                x = y + nn.functional.pad(given, (0, 0, 1, 0))
        return x


def test_reads_of_windows_are_choices_by_indices_in_each_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack(Windows).eval()
    inputs = {"x": torch.randn(2, 5, 4)}
    graph = capture(model, inputs, axes={"x": ("batch", "length", None)})
    assert not [node for node in graph.nodes() if node.target is torch.ops.aten.as_strided.default]
    peftfx.export_onnx(model, tmp_path / "out", inputs=inputs)
    x = torch.randn(3, 7, 4)
    (got,) = OnnxModel(tmp_path / "out")(x=x).values()
    torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)


def test_views_that_a_layer_returns_stay_views() -> None:
    torch.manual_seed(0)
    model = Stack(GivesViews).eval()
    graph = capture(model, {"x": torch.randn(2, 5, 4)}, axes={"x": ("batch", "length", None)})
    x = torch.randn(3, 7, 4)
    got = graph(x=x)
    torch.testing.assert_close(got, model(x))
