"""A number that the model's code says may be computed by an operator that ONNX has not; a value of the call may not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx


class Cut(nn.Module):
    """A layer whose outputs are cut off at a quantile of the normal distribution."""

    def __init__(self, given: bool) -> None:
        super().__init__()
        self.given, self.layer = given, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        share = y.sigmoid().amin() if self.given else torch.tensor(0.9, dtype=torch.float32)
        return (y - torch.distributions.Normal(0, 1).icdf(share) * y.std(-1, keepdim=True)).relu()


def test_a_quantile_is_a_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Cut(given=False).eval(), torch.randn(3, 4)
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x})
    other = 3 * torch.randn(5, 4)
    (found,) = peftfx.export.OnnxModel(tmp_path / "out")(x=other).values()
    torch.testing.assert_close(found, model(other).detach(), atol=1e-5, rtol=1e-5)


def test_a_quantile_of_what_is_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peftfx.PeftfxError, match="translation"):
        peftfx.export_onnx(Cut(given=True).eval(), tmp_path / "out", inputs={"x": torch.randn(3, 4)})


class Puts(nn.Module):
    """Writes at places that are numbers; its code names no other axis."""

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        y = x.clone()
        y[at] = 2.0
        return y


def test_a_translation_says_nothing_of_its_own_choices(tmp_path: Path) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("onnx_ir")
    logger.addHandler(handler)
    try:
        peftfx.export_onnx(Puts(), tmp_path / "out", inputs={"x": torch.randn(6), "at": torch.tensor([1, 4])})
    finally:
        logger.removeHandler(handler)
    assert heard == []
