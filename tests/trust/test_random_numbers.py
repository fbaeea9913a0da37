"""A model that draws random numbers in eval mode is refused: each wrong result could be another draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import export_onnx

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(8, 8), nn.Linear(8, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))


def attention(h: Tensor, dropout: float) -> Tensor:
    x = h[None, None]
    return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout)[0, 0]


def filled(noise: Tensor, h: Tensor) -> Tensor:
    noise[:, 2:4].uniform_()
    return h + noise


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.1),
    "randn_like": lambda h: h + torch.randn_like(h),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "gumbel": lambda h: F.gumbel_softmax(h),
    "in place": lambda h: h + torch.empty_like(h).uniform_(),
    "into a part": lambda h: filled(torch.zeros_like(h), h),
    "attention": lambda h: attention(h, 0.1),
}
STILL: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout that is off": lambda h: F.dropout(h, 0.1, training=False),
    "dropout of nothing": lambda h: F.dropout(h, 0.0),
    "numbers that nothing uses": lambda h: (torch.rand([]), h)[1],
    "numbers that nothing reads after they are written": lambda h: (torch.empty(3).uniform_(), h)[1],
    "attention": lambda h: attention(h, 0.0),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="draws random numbers in eval mode"):
        export_onnx(Model(DRAWS[name]).eval(), tmp_path / "out", inputs={"x": X})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", STILL)
def test_what_draws_nothing_is_exported(name: str, tmp_path: Path) -> None:
    model = Model(STILL[name]).eval()
    export_onnx(model, tmp_path / "out", inputs={"x": X})
    (got,) = peftfx.export.OnnxModel(tmp_path / "out")(x=X[:3]).values()
    torch.testing.assert_close(got, model(X[:3]).detach(), atol=1e-5, rtol=1e-5)
