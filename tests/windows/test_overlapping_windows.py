"""Attention over windows that overlap: texts of one window and of several are served by one graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel, export_onnx

pytestmark = pytest.mark.further

AXES = {"x": ("batch", "sequence", None)}
WINDOW, HEADS = 4, 2


class Overlapping(nn.Module):
    """Scores within windows that overlap by half, read with strides, as the code of Longformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        padding = (WINDOW - length % WINDOW) % WINDOW
        if padding > 0:
            x = F.pad(x, (0, 0, 0, padding))
        total = x.shape[1]
        heads = self.vectors(x).transpose(1, 2).reshape(batch * HEADS, total, 2)
        windows = self.overlapping(heads)
        scores = torch.einsum("bcxd,bcyd->bcxy", (windows, windows))
        result = scores.new_zeros((batch * HEADS, windows.shape[1] + 1, WINDOW // 2, WINDOW))
        result[:, :-1] = scores[:, :, : WINDOW // 2]
        result[:, -1] = scores[:, -1, WINDOW // 2 :]
        result = result.view(batch, HEADS, total, WINDOW).transpose(1, 2)
        return result[:, :-padding] if padding > 0 else result

    def vectors(self, x: Tensor) -> Tensor:
        return self.layer(x).view(x.shape[0], x.shape[1], HEADS, 2)

    def overlapping(self, heads: Tensor) -> Tensor:
        count = torch.div(heads.shape[1], WINDOW, rounding_mode="trunc")
        windows = heads.view(heads.shape[0], count, WINDOW, 2)
        sizes, strides = list(windows.size()), list(windows.stride())
        sizes[1], strides[1] = 2 * sizes[1] - 1, strides[1] // 2
        return windows.as_strided(size=sizes, stride=strides)


class Padded(Overlapping):
    """Makes the windows of a padded tensor of three axes."""

    def overlapping(self, heads: Tensor) -> Tensor:
        step = WINDOW // 2
        padded = F.pad(heads, (0, 0, step, step), value=-1.0)
        row, token, one = padded.stride()
        sizes = (heads.shape[0], heads.shape[1] // step - 1, WINDOW, 2)
        return padded.as_strided(size=sizes, stride=(row, step * token, token, one))


class TokensFirst(Overlapping):
    """Computes with the batch inside the tokens, so that rows of one head do not lie one after the other."""

    def vectors(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).view(x.shape[1], x.shape[0], HEADS, 2).transpose(0, 1)


@pytest.mark.parametrize("kind", [Overlapping, Padded, TokensFirst])
@pytest.mark.parametrize("length", [3, 7])
def test_a_text_of_one_window_gives_a_graph_for_several(kind: type[Overlapping], length: int) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    graph = peftfx.capture(model, {"x": torch.randn(2, length, 4)}, axes=AXES)
    assert graph.sizes["sequence"] == length
    for batch, other in ((1, 3), (3, 4), (1, 5), (2, 8), (1, 13)):
        x = torch.randn(batch, other, 4)
        torch.testing.assert_close(graph.run(x)[0], model(x))


@pytest.mark.parametrize("kind", [Overlapping, Padded, TokensFirst])
def test_an_export_of_one_window_serves_several(kind: type[Overlapping], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 3, 4)})
    assert not report.sizes
    served = OnnxModel(tmp_path / "out")
    for batch, length in ((1, 3), (3, 4), (1, 5), (2, 8), (1, 13)):
        x = torch.randn(batch, length, 4)
        torch.testing.assert_close(served(x=x)["output"], model(x), atol=1e-5, rtol=1e-5)


class WholeWindows(TokensFirst):
    """Repeats a text six times, and takes those that then are whole windows: `(6 * k) // (3 * k // 2)` tokens are 4."""

    def forward(self, x: Tensor) -> Tensor:
        total = 6 * x.shape[1]
        if total % WINDOW != 0:
            raise ValueError("the text has no whole windows")
        heads = self.vectors(x.repeat(1, 6, 1)).transpose(1, 2).reshape(x.shape[0] * HEADS, total, 2)
        windows = self.overlapping(heads)
        return torch.einsum("bcxd,bcyd->bcxy", (windows, windows))

    def overlapping(self, heads: Tensor) -> Tensor:
        count = torch.div(heads.shape[1], WINDOW, rounding_mode="trunc")
        windows = heads.view(heads.shape[0], count, heads.shape[1] // count, 2)
        sizes, strides = list(windows.size()), list(windows.stride())
        sizes[1], strides[1] = 2 * sizes[1] - 1, strides[1] // 2
        return windows.as_strided(size=sizes, stride=strides)


def test_a_window_of_a_text_that_is_whole_is_known_by_the_recorded_condition(tmp_path: Path) -> None:
    """torch does not simplify by it. The read was left, and its translation to ONNX reads the elements in one row."""
    torch.manual_seed(0)
    model = WholeWindows().eval()
    graph = peftfx.capture(model, {"x": torch.randn(2, 4, 4)}, axes=AXES)
    assert not graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 4, 4)})
    served = OnnxModel(tmp_path / "out")
    for batch, length in ((1, 4), (3, 2), (1, 6), (2, 10)):
        x = torch.randn(batch, length, 4)
        torch.testing.assert_close(graph.run(x)[0], model(x))
        torch.testing.assert_close(served(x=x)["output"], model(x), atol=1e-5, rtol=1e-5)


class FewWindows(Overlapping):
    """Takes no text of several windows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > WINDOW:
            raise ValueError("the text is too long")
        return super().forward(x)


class Blocks(nn.Module):
    """Attention within blocks, as in the code of PEGASUS-X, which pads a text only where its length is no multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length % WINDOW != 0:
            x = F.pad(x, (0, 0, 0, WINDOW - length % WINDOW))
        count = x.shape[1] // WINDOW
        blocks = self.layer(x).view(x.shape[0], count, WINDOW, 4)
        scores = torch.einsum("bkqf,bkxf->bkqx", blocks, blocks).softmax(-1)
        return (scores @ blocks).view(x.shape[0], -1, 4)[:, :length]


class Written(nn.Module):
    """Writes into a tensor after a strided read of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        read = y.as_strided(size=(x.shape[0], 2, 2), stride=(x.shape[1], 1, 1))
        y[:, 0] = 7.0
        return read + 0


def test_a_strided_read_sees_what_is_written_after_it() -> None:
    x = torch.randn(2, 5)
    graph = peftfx.capture(Written().eval(), {"x": x})
    torch.testing.assert_close(graph.run(x)[0], Written()(x))


def test_a_longer_example_is_on_the_same_side_of_the_codes_branches() -> None:
    """A text of one block of 4 is not captured anew at 4 tokens, where the code pads nothing and fixes the length."""
    torch.manual_seed(0)
    model = Blocks().eval()
    graph = peftfx.capture(model, {"x": torch.randn(2, 3, 4)}, axes=AXES)
    assert graph.sizes["sequence"] == 3
    for batch, length in ((1, 3), (3, 5), (1, 7), (2, 13)):
        x = torch.randn(batch, length, 4)
        torch.testing.assert_close(graph.run(x)[0], model(x))


def test_a_model_that_takes_one_window_is_captured_for_one() -> None:
    torch.manual_seed(0)
    model = FewWindows().eval()
    graph = peftfx.capture(model, {"x": torch.randn(2, 3, 4)}, axes=AXES)
    for length in (2, 3, 4):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(graph.run(x)[0], model(x))
