"""A number that the model's code says may be computed by an operator that ONNX has not; a value of the call may not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
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


@torch.no_grad()
def test_a_logarithm_that_is_rounded_to_a_whole_number_is_torchs(tmp_path: Path) -> None:
    """DeBERTa's last bucket of positions: the logarithms of its ends are divided, and the last bit decides."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    near = {"relative_attention": True, "position_buckets": 4, "max_relative_positions": 8, "pos_att_type": ["p2c"]}
    config = hf.DebertaV2Config(**sizes, **near, vocab_size=99, type_vocab_size=0, pad_token_id=0)
    torch.manual_seed(0)
    model = hf.DebertaV2ForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    peftfx.export_onnx(model.eval(), tmp_path / "out", view="forward")
    ids = torch.randint(5, 90, (2, 17))
    got = peftfx.runtime.load(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
