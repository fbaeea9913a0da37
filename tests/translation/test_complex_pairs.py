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


def test_an_operator_on_complex_numbers_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peftfx.PeftfxError, match="translation"):
        peftfx.export_onnx(Turned("unknown").eval(), tmp_path / "out", inputs={"x": torch.randn(2, 5, 6)})
    assert not (tmp_path / "out").exists()
