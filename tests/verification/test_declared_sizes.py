"""An export is told to be right only at sizes for which its tensors are as large as the file says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel, export_onnx


class Heard(nn.Module):
    """A convolution that takes no fewer than 40 values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 4, 40, stride=5), nn.Linear(4, 4)

    def forward(self, input_values: Tensor) -> Tensor:
        return self.out(self.conv(input_values[:, None]).transpose(1, 2))


def test_a_model_that_takes_none_of_the_usual_sizes_is_compared_beside_its_examples(tmp_path: Path) -> None:
    report = export_onnx(Heard().eval(), tmp_path / "out", inputs={"input_values": torch.randn(2, 80)})
    seen = {tuple(sizes["input_values"]) for sizes in report.probes}
    assert {(2, 80), (1, 80), (5, 83)} <= seen


class Last(nn.Module):
    """The last four of a row, and of its mask: torch broadcasts a mask of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x[:, -4:] * mask[:, -4:].abs())


class Windows(nn.Module):
    """Means over windows of four; what is not whole is padded, and what is whole is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rest = -x.shape[1] % 4
        if rest > 0:
            x = F.pad(x, (0, 0, 0, rest))
        return self.layer(x).unflatten(1, (-1, 4)).mean(2)


class Halved(nn.Module):
    """Windows of four, of half as many places in each next layer; short inputs are not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 10:
            raise ValueError("too short")
        for _ in range(3):
            length = x.shape[1]
            rest = -length % 4
            if rest > 0:
                x = F.pad(x, (0, 0, 0, rest))
            x = self.layer(x).unflatten(1, (-1, 4)).softmax(2).flatten(1, 2)[:, :length]
            x = x[:, : length // 2 * 2].unflatten(1, (-1, 2)).mean(2)
        return x


class OddAndEven(nn.Module):
    """Another function of whole windows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 3 if x.shape[1] % 4 else self.layer(x)


@pytest.mark.parametrize("length", [7, 8])
def test_an_example_of_whole_windows_is_captured_as_one_that_is_padded(length: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Windows().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, length, 4)})
    assert report.inputs == {"x": ["batch", "x.1", 4]}
    served = OnnxModel(tmp_path / "out")
    for other in (1, 4, 6, 12, 13):
        x = torch.randn(3, other, 4)
        torch.testing.assert_close(served(x=x)["output"], model(x).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [24, *(pytest.param(n, marks=pytest.mark.further) for n in (32, 45))])
def test_an_example_of_whole_windows_in_one_layer_alone_is_captured_as_one_that_is_padded_in_all(
    length: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Halved().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, length, 4)})
    assert report.sizes == ["x.1 >= 10 (the model takes no other)"]
    served = OnnxModel(tmp_path / "out")
    for other in (10, 12, 13, 16, 23, 24, 31, 32):
        x = torch.randn(3, other, 4)
        torch.testing.assert_close(served(x=x)["output"], model(x).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "word"), [(7, "!="), (8, "=")])
def test_code_that_computes_something_else_there_is_refused(length: int, word: str, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=f"right only where x.1 % 4 {word} 0"):
        export_onnx(OddAndEven().eval(), tmp_path / "out", inputs={"x": torch.randn(2, length, 4)})


def test_a_mask_of_one_is_refused_where_the_file_declares_four(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Last().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 6), "mask": torch.randn(2, 6)})
    assert "x.1 >= 4 (the export declares other sizes of tensors inside)" in report.sizes
    assert "mask.1 >= 4 (the export declares other sizes of tensors inside)" in report.sizes
    served = OnnxModel(tmp_path / "out")
    x, mask = torch.randn(3, 9), torch.randn(3, 5)
    torch.testing.assert_close(served(x=x, mask=mask)["output"], model(x, mask).detach(), atol=1e-5, rtol=0)
    with pytest.raises(PeftfxError, match=r"mask.1 >= 4"):
        served(x=x, mask=mask[:, :1])


@pytest.mark.further
def test_attention_over_both_sides_that_has_no_mask_has_none_in_a_capture(tmp_path: Path) -> None:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    config = transformers.InformerConfig(
        prediction_length=4, context_length=12, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, num_time_features=1,
        lags_sequence=[1, 2, 3], attention_type="full", distil=False, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.InformerModel(config).eval()

    def inputs(batch: int) -> dict[str, Tensor]:
        future = {"future_values": torch.rand(batch, 4), "future_time_features": torch.rand(batch, 4, 1)}
        past = {"past_values": torch.rand(batch, 15), "past_time_features": torch.rand(batch, 15, 1)}
        return {**past, "past_observed_mask": torch.ones(batch, 15), **future}

    rules = peftfx.LoRA(r=2, target="attention", init_lora_weights=False)
    adapted = peftfx.transform(base, rules, inputs=inputs(2))
    adapted.export(tmp_path / "out")
    case = inputs(3)
    got, want = OnnxModel(tmp_path / "out")(**case), adapted(**case)[0]
    torch.testing.assert_close(next(iter(got.values())), want.detach(), atol=1e-5, rtol=0)
