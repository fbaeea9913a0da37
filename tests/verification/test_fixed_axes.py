"""Axes that a capture fixes at the example's size: an export tells them where the model itself takes others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel, export_onnx
from peftfx.export.verification.sizes.trial import Trial
from peftfx.views.capture import capture


class Masked(nn.Module):
    """Attention with a mask that is added, of any shape that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ x.transpose(1, 2)
        return self.out(torch.softmax(scores[:, None] + mask, -1)[:, 0] @ x)


class Recurrent(nn.Module):
    """Code that runs a cell step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.out(state)


def test_a_mask_with_axes_of_size_1_is_repeated_along_the_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 5, 8), "mask": torch.randn(2, 1, 1, 5)})
    assert report.inputs == {"x": ["batch", "x.1", 8], "mask": ["batch", 1, 1, "mask.3"]}
    assert any(line.startswith("axis 2 of mask is 1 (as in the example") for line in report.sizes)
    for batch, length in ((1, 1), (3, 7)):
        case = {"x": torch.randn(batch, length, 8), "mask": torch.randn(batch, 1, 1, length)}
        (got,) = OnnxModel(tmp_path / "out")(**case).values()
        torch.testing.assert_close(got, model(**case).detach(), atol=1e-5, rtol=1e-5)


def test_an_adapter_is_trained_with_such_a_mask() -> None:
    case = {"x": torch.randn(2, 5, 8), "mask": torch.randn(2, 1, 1, 5)}
    base = Masked()
    want = base(**case).detach()
    adapted = peftfx.transform(base, peftfx.LoRA(r=2, target="all-linear"), inputs=case, road="graph")
    torch.testing.assert_close(adapted(**case), want)


@pytest.mark.parametrize("length", [1, 2])
def test_an_axis_of_size_1_stays_free_where_it_can(length: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    report = export_onnx(model, tmp_path / "out", inputs={"input": torch.randn(2, length, 8)})
    assert report.inputs == {"input": ["batch", "input.1", 8]}
    assert report.sizes == []


def test_the_steps_of_a_loop_are_told(tmp_path: Path) -> None:
    report = export_onnx(Recurrent().eval(), tmp_path / "out", inputs={"x": torch.randn(2, 5, 8)})
    (told,) = report.sizes
    assert told == "axis 1 of x is 5 (as in the example: the capture fixes it; the model takes others)"
    assert told in str(report)
    with pytest.raises(PeftfxError, match="axis 1 of x is 5"):
        OnnxModel(tmp_path / "out")(x=torch.randn(2, 6, 8))


class Twice(nn.Module):
    """Code in which one length follows from another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x).repeat_interleave(2, 1) + y  # type: ignore[no-any-return]


def test_lengths_of_which_one_follows_from_the_other_are_told_where_an_example_of_one_fixes_them(
    tmp_path: Path,
) -> None:
    """Neither is free without the other, so that each alone looked as if the model took no other."""
    case = {"x": torch.randn(1, 1, 8), "y": torch.randn(1, 2, 8)}
    report = export_onnx(Twice().eval(), tmp_path / "out", inputs=case)
    assert report.inputs == {"x": ["batch", 1, 8], "y": ["batch", 2, 8]}
    told = "(as in the example: the capture fixes it; the model takes others)"
    assert report.sizes == [f"axis 1 of x is 1 {told}", f"axis 1 of y is 2 {told}"]


class Strided(nn.Module):
    """Code that asks how many steps strides leave, as encoders of recordings do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if (x.shape[1] - 10) // 80 // 4 > 5 else x


def test_what_is_tried_is_no_longer_than_the_example() -> None:
    """Of the lengths that are tried for a condition, none but a million may meet it. The example meets it."""
    graph = capture(Strided().eval(), {"x": torch.zeros(2, 6080)})
    trial = Trial(graph, lambda sizes: {}, lambda feed: [], lambda name, feed, value: value, graph.sizes, 8)
    assert trial.whole({}) == {"batch": 2, "x.1": 6080}


class FilledUp(nn.Module):
    """Code that fills its pieces up to as many as a text has places for."""

    def __init__(self) -> None:
        super().__init__()
        self.filling, self.out = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.out.in_features + 12 - 8 - (x.shape[1] + 1) // 2
        return self.out(torch.cat((x[:, ::2], self.filling.expand(x.shape[0], pieces, 8)), 1))


def test_what_is_filled_up_may_not_be_longer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FilledUp().eval()
    report = export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 5, 8)})
    assert "x.1 <= 24 (the model takes no other)" in " ".join(report.sizes)
    served = OnnxModel(tmp_path / "out")
    for length in (1, 7, 23, 24):
        x = torch.randn(3, length, 8)
        torch.testing.assert_close(next(iter(served(x=x).values())), model(x).detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(PeftfxError, match=r"x.1 is 27, and the graph takes x.1 <= 24"):
        served(x=torch.randn(1, 27, 8))


@pytest.mark.parametrize(("beside", "told"), [(False, "takes a size of 1 there, too"), (True, "no other")])
def test_axes_that_are_equal_or_repeated(tmp_path: Path, beside: bool, told: str) -> None:
    """A capture takes two axes as equal where a sum repeats one of size 1, and where a concatenation needs it."""
    example = {"x": torch.randn(3, 5, 8), "y": torch.randn(3, 5, 8)}
    report = export_onnx(Summed(beside).eval(), tmp_path / "out", inputs=example)
    assert "y.1" in report.sizes[0]
    assert told in report.sizes[0]


class Summed(nn.Module):
    """Code that sums two inputs, or puts one beside the other."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside, self.out = beside, nn.Linear(16 if beside else 8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.cat((x, y), 2) if self.beside else x + y)


class InParts(nn.Module):
    """Code that returns as many parts as a tensor has, which is fewer than it asks for if the text is short."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.out(x).chunk(5, 1)


def test_sizes_at_which_a_model_has_other_outputs_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = InParts().eval(), torch.randn(2, 5, 8)
    with pytest.raises(PeftfxError, match="the model's code branches on a size"):
        export_onnx(model, tmp_path / "out", inputs={"x": x})
    export_onnx(model, tmp_path / "out", inputs={"x": x}, allow_fixed=True)
    longer = torch.randn(3, 10, 8)
    for got, want in zip(OnnxModel(tmp_path / "out")(x=longer).values(), model(longer), strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-5)
