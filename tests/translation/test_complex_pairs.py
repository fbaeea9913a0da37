"""Rotations by complex numbers, as pairs of reals in ONNX; what is not known stays refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx


class Turned(nn.Module):
    """A layer whose features are turned by complex numbers, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(self.layer(x).reshape(*x.shape[:-1], -1, 2))
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
        turn = torch.polar(torch.ones_like(angle), angle) * 1.5
        if self.way == "moved":
            y = y.unsqueeze(1)[..., :3] * turn[None, None, :, 1:].contiguous()
        elif self.way == "real":
            y = y * angle.cos()[None] * turn.select(0, 1)
        elif self.way == "unknown":
            y = y.exp() * turn
        else:
            y = y * turn
        return torch.view_as_real(y).flatten(-2)


@pytest.mark.parametrize("way", ["plain", "moved", "real"])
def test_onnx_turns_as_torch_does(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Turned(way).eval(), torch.randn(2, 5, 6)
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x})
    other = torch.randn(3, 7, 6)
    (found,) = peftfx.export.OnnxModel(tmp_path / "out")(x=other).values()
    torch.testing.assert_close(found, model(other).detach(), atol=1e-5, rtol=1e-5)


class Table(nn.Module):
    """Queries turned by the rows of a table of complex numbers, as in the first publication of LLaMA."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(6, 8)
        angle = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.3]))
        self.register_buffer("table", torch.polar(torch.ones_like(angle), angle), persistent=False)
        self.weight = nn.Parameter(torch.randn(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(self.layer(x).view(*x.shape[:2], 2, 2, 2))  # two heads
        if self.way == "sliced":
            y = y * self.table[: x.shape[1]].view(1, x.shape[1], 1, 2)
        elif self.way == "chosen":
            places = (x[..., 0] > 0).long() + torch.arange(x.shape[1])
            y = y * self.table[places].conj().unsqueeze(2)
        elif self.way == "trained":
            y = torch.cat([y * self.weight, -y], 1).transpose(1, 2).permute(0, 2, 1, 3)
            y = y + y.flip(-1) - self.table[0].expand(2, 2)
        else:
            y = torch.fft.fft(y, dim=-1) * self.weight
        return torch.view_as_real(y).flatten(2)


@pytest.mark.parametrize("way", ["sliced", "chosen", "trained", "transformed"])
def test_tables_of_complex_numbers_are_pairs_in_the_file(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Table(way).eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 5, 6)})
    for batch, length in ((3, 7), (1, 1)):
        other = torch.randn(batch, length, 6)
        (found,) = peftfx.export.OnnxModel(tmp_path / "out")(x=other).values()
        torch.testing.assert_close(found, model(other).detach(), atol=1e-5, rtol=1e-5)


def test_an_operator_on_complex_numbers_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peftfx.PeftfxError, match="translation"):
        peftfx.export_onnx(Turned("unknown").eval(), tmp_path / "out", inputs={"x": torch.randn(2, 5, 6)})
    assert not (tmp_path / "out").exists()
