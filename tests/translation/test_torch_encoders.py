"""torch's encoder layers, which leave padding out on a fast path of their own, in calls without gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel


class Encoder(nn.Module):
    """An encoder of words, some of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(30, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        tags: Tensor = self.tags(self.encoder(self.words(ids), src_key_padding_mask=padding))
        return tags


def call(*lengths: int) -> dict[str, Tensor]:
    places = torch.arange(max(lengths))
    ids = torch.randint(30, (len(lengths), len(places)), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "padding": places >= torch.tensor(lengths)[:, None]}


@pytest.mark.parametrize("rule", ["", "ia3@all-linear", "lora(r=2)@all-linear"])
def test_they_are_verified_by_the_road_that_the_graph_has(rule: str, tmp_path: Path) -> None:
    """The fast path gives zeros for padding, in float32 alone: the tolerance was 1.3, or torch raised an error."""
    torch.manual_seed(0)
    base, given = Encoder().eval(), call(5, 3)
    if rule:
        adapted = peftfx.transform(base, rule, inputs=given).eval()
        with torch.no_grad():
            for p in adapted.adapters.parameters():
                p.add_(0.3 * torch.randn_like(p))
        report = adapted.export(tmp_path / "out")
    else:
        adapted, report = base, peftfx.export_onnx(base, tmp_path / "out", inputs=given)
    assert report.max_abs < 1e-5
    assert torch.backends.mha.get_fastpath_enabled()
    other = call(4, 7, 1)
    with torch.no_grad():
        got, want = OnnxModel(tmp_path / "out")(**other)["output"], adapted(**other)
    torch.testing.assert_close(got[~other["padding"]], want[~other["padding"]], atol=1e-5, rtol=1e-5)


def test_a_text_of_padding_alone_gives_numbers(tmp_path: Path) -> None:
    """Its mask has -inf for all keys: torch's attention gives 0 there, and ONNX Runtime gave NaN."""
    base = Encoder().eval()
    peftfx.export_onnx(base, tmp_path / "out", inputs=call(5, 0))
    other = call(4, 0, 2)
    got, want = OnnxModel(tmp_path / "out")(**other)["output"], base(**other)  # with gradients: not the fast path
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-5)
