"""Code that makes a tensor of a size, and computes and slices with it, is captured for every size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.zoo import ZOO
from torch import Tensor, nn

from peftfx.export import OnnxModel, export_onnx
from peftfx.export.verification.tolerances.float64 import float64
from peftfx.model.api import bare
from peftfx.views.capture import capture

AXES = {"x": ("batch", "sequence", None)}


class Spans(nn.Module):
    """Reads as many rows of a table on each side of its middle as the text has tokens, but at most the half."""

    def __init__(self, half: int = 16) -> None:
        super().__init__()
        self.layer, self.table, self.half = nn.Linear(4, 4), nn.Parameter(torch.randn(2 * half, 4)), half

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        span = torch.tensor(min(x.size(1), self.half))
        near = self.table[self.half - span : self.half + span, :]
        places = torch.clamp(torch.arange(x.size(1)) - span + 3, 0, span * 2 - 1)
        return x * torch.tensor(x.shape[1], dtype=torch.float32).sqrt() + near[places] + near.mean(0)


@pytest.mark.parametrize("length", [1, 3, 9, 16, 21])
def test_a_tensor_of_a_size_is_free(length: int) -> None:
    model = Spans().eval()
    graph, x = capture(model, {"x": torch.randn(2, 7, 4)}, axes=AXES), torch.randn(3, length, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(x)[0], model(x), rtol=0.0, atol=1e-6)


def test_onnx_runtime_computes_it_for_every_length(tmp_path: Path) -> None:
    model = Spans().eval()
    export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 7, 4)}, view="forward")
    served = OnnxModel(tmp_path / "out")
    (name,) = served.outputs
    for length in (1, 2, 7, 15, 16, 17, 40):
        x = torch.randn(2, length, 4)
        with torch.no_grad():
            torch.testing.assert_close(served(x=x)[name], model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [3, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 9, 20, 60))])
def test_debertas_span_of_positions_is_its_texts_length(length: int) -> None:
    """In float64 nothing but the span could differ."""
    base = ZOO["deberta"].build()
    graph, inputs = bare(base).graph(), ZOO["deberta"].inputs(2, length, model=base)
    assert not [c for c in graph.conditions if not c.edge and "Min" in str(c)]
    with torch.no_grad(), float64():
        torch.testing.assert_close(graph(**inputs).logits, base(**inputs).logits, rtol=0.0, atol=1e-7)
