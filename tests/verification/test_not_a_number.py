"""A NaN is a difference, where a capture is held to its model and in the tests' own measure of a difference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.parity import farthest

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export.verification.captured import hold
from peftfx.export.verification.comparison import VerificationError

NAN, INF = math.nan, math.inf
NUMBERS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -INF]])
WRONG = pytest.mark.parametrize(("place", "number"), [((0, 0), NAN), ((1, 2), NAN), ((0, 1), INF), ((1, 2), 0.0)])


def spoiled(place: tuple[int, int], number: float) -> torch.Tensor:
    other = NUMBERS.clone()
    other[place] = number
    return other


@WRONG
def test_a_capture_that_gives_nan_or_another_infinity_is_refused(place: tuple[int, int], number: float) -> None:
    hold("y", NUMBERS, NUMBERS + 1e-7, 1e-5)
    with pytest.raises(VerificationError, match=r"the captured model differs from the model by (nan|inf)"):
        hold("y", NUMBERS, spoiled(place, number), 1e-5)


def test_a_nan_of_the_model_itself_hides_no_other_number() -> None:
    own = spoiled((0, 0), NAN)
    hold("y", own, NUMBERS, 1e-5)
    with pytest.raises(VerificationError, match=r"differs from the model by 1\.00e\+00"):
        hold("y", own, spoiled((1, 0), 4.0), 1e-5)


@WRONG
def test_the_measure_of_tests_loses_no_nan_and_no_infinity(place: tuple[int, int], number: float) -> None:
    right = {"x": torch.ones(2)}
    assert farthest({"y": NUMBERS + 1e-7, **right}, {"y": NUMBERS, **right}, {}) < 1e-6
    assert farthest({"y": spoiled(place, number), **right}, {"y": NUMBERS, **right}, {}) == INF


def test_a_capture_of_another_shape_is_told_with_both_shapes() -> None:
    with pytest.raises(VerificationError, match=r"captured model gives \[2, 3\] where the model gives \[3, 2\]"):
        hold("y", torch.ones(3, 2), torch.ones(2, 3), 1e-5)


@pytest.mark.parametrize("width", [2, 40], ids=["in the graph", "beside the graph"])
@pytest.mark.parametrize(("number", "what"), [(NAN, "NaN"), (-INF, "an infinity")], ids=["nan", "infinity"])
def test_a_weight_that_is_not_finite_is_not_written(width: int, number: float, what: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(width, width).eval()
    torch.nn.init.constant_(model.weight[-1:, :1], number)
    with pytest.raises(PeftfxError, match=rf"this tensor holds {what} \[base.weight\]"):
        peftfx.export_onnx(model, tmp_path / "out", inputs={"input": torch.randn(2, width)})
