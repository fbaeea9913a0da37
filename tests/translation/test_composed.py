"""Operators that ONNX lacks are written in operators that it has, and are torch's at sizes that nothing was made at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.export import OnnxModel

WEIGHT, TABLE = torch.tensor([1.0, 0.5, 2.0, 0.1]), torch.arange(12.0).view(4, 3).sin()
EDGES = torch.tensor([-1.0, 0.0, 0.5])


def _written(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] *= 0.1
    return y


def _places(x: Tensor) -> Tensor:
    """Each place of the second axis twice; the last half of the axis has none."""
    return (torch.arange(x.shape[1]) // 2)[:, None].expand_as(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "products so far": lambda x: x.cumprod(1),
    "median": lambda x: x.median(1).values,
    "place of the median": lambda x: x.median(2, keepdim=True).indices,
    "median of all": torch.median,
    "second smallest": lambda x: x.kthvalue(2, dim=-1).values,
    "largest so far": lambda x: x.cummax(1).values,
    "place of the largest so far": lambda x: x.round().cummax(1).indices,
    "smallest so far": lambda x: x.cummin(1).values,
    "largest of all": lambda x: x - x.amax(),
    "smallest of all": lambda x: x - x.amin((), keepdim=True),
    "smallest and largest": lambda x: torch.stack([*torch.aminmax(x, dim=1), *torch.aminmax(x)[:0]]) - x.aminmax()[1],
    "distances": lambda x: torch.cdist(x, 2 * x),
    "sums of differences": lambda x: torch.cdist(x, x[:, :1], p=1.0),
    "largest difference": lambda x: torch.cdist(x, x + 1, p=torch.inf),
    "length": lambda x: torch.hypot(x, x * 1e30),
    "place in a table": lambda x: torch.searchsorted(EDGES, x, right=True),
    "place in its own row": lambda x: torch.searchsorted(x.sort(-1).values.contiguous(), x.contiguous()),
    "among a few": lambda x: torch.isin(x.round(), EDGES.round()).float(),
    "none of many": lambda x: torch.isin((9 * x).round(), torch.arange(-30.0, 0.0).view(5, 6), invert=True).float(),
    "random leak": lambda x: nn.functional.rrelu(x, 0.1, 0.5),
    "parts": lambda x: torch.cat([part.sum(1) for part in x.tensor_split(3, dim=1)], -1),
    "the first half": lambda x: x.tensor_split(2, dim=-2)[0],
    "chosen": lambda x: x.masked_select(x > 0),
    "places in a stable order": lambda x: x.round().argsort(dim=1, stable=True, descending=True),
    "a stable order": lambda x: torch.sort(x.round(), dim=-1, stable=True).values,
    "the larger number": lambda x: torch.fmax(torch.where(x > 0, x, torch.nan), torch.where(x < 1, 0.5, torch.nan)),
    "the smaller number": lambda x: torch.fmin(torch.where(x > 0, x, torch.nan), x.flip(1)),
    "another's sign": lambda x: torch.copysign(x.flip(1), x),
    "loss of probabilities": lambda x: nn.functional.cross_entropy(x.mT, x.flip(1).softmax(-1).mT, weight=WEIGHT),
    "loss of smoothed labels": lambda x: nn.functional.cross_entropy(
        x.flatten(0, 1), x.flip(1).argmax(-1).flatten(), WEIGHT, ignore_index=2, label_smoothing=0.2
    ),
    "loss of each": lambda x: nn.functional.cross_entropy(
        x.mT, x.flip(1).argmax(-1), ignore_index=1, reduction="none", label_smoothing=0.1
    ),
    "sums of bags": lambda x: nn.functional.embedding_bag(
        x.argmax(-1), TABLE, mode="sum", per_sample_weights=x[..., 0]
    ),
    "means of bags": lambda x: nn.functional.embedding_bag(x.argmax(-1), TABLE, padding_idx=2),
    "maxima of bags": lambda x: nn.functional.embedding_bag(x.argmax(-1), TABLE, mode="max", padding_idx=-1),
    "bags with offsets": lambda x: nn.functional.embedding_bag(
        x.argmax(-1).flatten(), TABLE, torch.tensor([0, 0, 1, x[..., 0].numel()]), mode="mean", include_last_offset=True
    ),
    "added at places": lambda x: torch.zeros_like(x).scatter(2, (x > 0).long(), x, reduce="add"),
    "a number added at places": lambda x: x.clone().scatter_(2, x[:, :1].argsort(-1), 0.5, reduce="add"),
    "multiplied at places": lambda x: torch.ones_like(x).scatter(2, (x < 0).long(), x, reduce="multiply"),
    "means by place": lambda x: (x * 0 + torch.inf).scatter_reduce(1, _places(x), x, "mean", include_self=False),
    "means by place, with what was there": lambda x: x.scatter_reduce(1, _places(x), x.exp(), "mean"),
    "whole means by place": lambda x: (9 * x).long().scatter_reduce(1, _places(x), (7 * x).long(), "mean"),
    "products of rows by place": lambda x: x.index_reduce(1, _places(x)[0, :, 0], x, "prod", include_self=False),
    "means of rows by place": lambda x: x.index_reduce(-2, _places(x)[0, :, 0].int(), x.exp(), "mean"),
    "one line": lambda x: x + torch.linspace(2.0, 3.0, x.shape[1])[:, None],
    "numbers in a row": lambda x: x / torch.arange(1, 5.0) + torch.arange(1.0, x.shape[1] + 1)[:, None],
    "numbers of sizes": lambda x: x * torch.tensor([x.shape[1], 0.5]).sum() + torch.tensor([[x.shape[0]], [3]])[0],
    "half a size": lambda x: x / torch.tensor(x.shape[1] * 0.5),
    "written where it is large": lambda x: _written(x, x > 9),
    "written where it is negative": lambda x: _written(x, x < 0),
    "chosen rows": lambda x: x.masked_select(x[..., :1] > 0),
}


class Behind(nn.Module):
    """A function of what a layer gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_torchs_at_every_size(name: str, tmp_path: Path) -> None:
    model = Behind(FUNCTIONS[name]).eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 7, 4)})
    served = OnnxModel(tmp_path / "out")
    for batch, length in ((1, 4), (3, 8), (2, 13), (1, 1)):
        x = torch.randn(batch, length, 4)
        torch.testing.assert_close(served(x=x)["output"], model(x), atol=1e-5, rtol=1e-4)


def test_a_median_of_what_is_no_number_is_none(tmp_path: Path) -> None:
    model = Behind(FUNCTIONS["median"]).eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 7, 4)})
    x = torch.randn(2, 6, 4)
    x[0, 2] = torch.nan
    found = OnnxModel(tmp_path / "out")(x=x)["output"]
    assert found[0].isnan().all()
    torch.testing.assert_close(found, model(x), equal_nan=True)


class Spectral(nn.Module):
    """Weighs the frequencies of sounds."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = nn.Linear(17, 17), {"n_fft": 32, **options}
        self.register_buffer("window", torch.hann_window(options.get("win_length", 32)))

    def forward(self, x: Tensor) -> Tensor:
        options = {"window": self.window, **self.options}
        given = {name: value for name, value in options.items() if name not in ("length", "onesided")}
        found = torch.stft(x, return_complex=True, **given)
        found = found * self.layer(found.abs().mT).sigmoid().mT
        if not options.get("onesided", True):
            found = torch.cat([found, found[..., 1:16, :].flip(-2).conj()], -2)
        return torch.istft(found, **options)


@pytest.mark.further
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hop_length": 5, "win_length": 20, "normalized": True},
        {"length": 70},
        {"onesided": False},
        {"hop_length": 10, "window": torch.ones(32), "center": False},
    ],
    ids=range(5),
)
def test_sounds_are_made_of_their_spectra(options: Any, tmp_path: Path) -> None:
    """The graph had indices of 32 bits, and ONNX Runtime did not open it."""
    model = Spectral(**options).eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 90)})
    served = OnnxModel(tmp_path / "out")
    for batch, length in ((1, 64), (3, 101)):
        x = torch.randn(batch, length)
        torch.testing.assert_close(served(x=x)["output"], model(x), atol=1e-5, rtol=1e-4)


class OfSeveralSizes(nn.Module):
    """One layer at three lengths that the exporter has no names for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.layer(x)
        return self.layer(x[:, :2].mean(1)), first, self.layer(torch.cat([x, first], 1))


def test_sizes_that_are_not_known_have_no_name_in_common(tmp_path: Path) -> None:
    """ONNX Runtime keeps sizes of one name in one buffer."""
    model = OfSeveralSizes().eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 7, 8)})
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(tuple(OnnxModel(tmp_path / "out")(x=x).values()), model(x), atol=1e-5, rtol=1e-4)
    values = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.value_info
    assert "None" not in {size.dim_param for value in values for size in value.type.tensor_type.shape.dim}


class Inverse(nn.Module):
    """An operator that ONNX has not, in a module of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(4, 4), Behind(torch.linalg.inv)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x))


def test_what_has_no_translation_is_named_with_its_module(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=r"torch's linalg_inv_ex has no translation to ONNX \[inner\]"):
        peftfx.export_onnx(Inverse().eval(), tmp_path / "out", inputs={"x": torch.randn(2, 4, 4)})
    assert not (tmp_path / "out").exists()


class Vectors(nn.Module):
    """Products of transposed values with vectors, on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.vector = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        turned = (y * 2).transpose(1, 2)
        return (
            turned @ x[0, :, 0],
            y.transpose(1, 2).transpose(1, 2) @ self.vector,
            self.vector @ (y * 3).transpose(1, 2),
        )


def test_a_transposed_value_times_a_vector(tmp_path: Path) -> None:
    """ONNX Runtime's MatmulTransposeFusion computes another product of these."""
    torch.manual_seed(0)
    model = Vectors().eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="linear"), inputs={"x": torch.randn(2, 5, 6)})
    adapted.export(tmp_path / "out")
    x = torch.randn(3, 7, 6)
    for got, want in zip(OnnxModel(tmp_path / "out")(x=x).values(), adapted(x=x), strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-5)
