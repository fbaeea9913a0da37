"""The measured tolerance of an output: its magnitude differs from call to call, or a sigmoid makes it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from verification.spoiled import spoil_captures

import peftfx
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.tolerances.tolerance import Tolerance
from peftfx.export.verification.verify import verify

CALLS = ((0.33, 1e-7), (0.24, 9e-8), (0.31, 1.2e-7), (0.17, 8e-8))


def learned(*more: tuple[float, float]) -> Tolerance:
    tolerance = Tolerance(None, None)
    for largest, noise in (*CALLS, *more):
        tolerance.learn("logits", noise, largest, torch.float32)
    return tolerance


@pytest.mark.parametrize("noise", [1.6e-9, 1e-7])
def test_the_only_number_of_a_call_is_nearly_zero_by_chance(noise: float) -> None:
    """Its rounding errors are those of other calls, and it decides nothing about theirs."""
    plain, found = learned(), learned((0.0018, noise))
    for largest, _ in CALLS:
        assert found.bound("logits", largest, torch.float32) == pytest.approx(
            plain.bound("logits", largest, torch.float32), rel=0.3
        )
    assert found.bound("logits", 0.0018, torch.float32) >= 8e-7


def test_what_most_calls_reach_decides() -> None:
    """One call of large numbers widens no other call's tolerance."""
    found = learned((1000.0, 1e-4))
    assert found.bound("logits", 0.2, torch.float32) < 1e-5


def test_zeros_must_be_zeros() -> None:
    tolerance = learned()
    tolerance.learn("empty", 0.0, 0.0, torch.float32)
    assert tolerance.bound("empty", 0.0, torch.float32) == 0.0


class Rare(nn.Module):
    """A classifier of things that are nearly never there."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.up, self.score = nn.Linear(16, 32), nn.Linear(32, 4)
        nn.init.constant_(self.score.bias, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(self.up(x).relu())
        return torch.stack([scores.sigmoid(), scores.sigmoid()])[1], scores.exp()


@pytest.mark.parametrize("bias", [-7.0, -12.0])
def test_small_probabilities_of_a_sigmoid_are_verified(bias: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = peftfx.transform(Rare(bias).eval(), peftfx.LoRA(r=2, target="linear"), inputs={"x": torch.randn(3, 16)})
    adapted.export(tmp_path / "out")
    graph, x = adapted.graph(), torch.randn(5, 16)
    sigmoid, exponential = graph.outputs
    for factor, name in ((1.02, sigmoid), (1 + 1e-4, exponential)):

        def wrong(feed: dict[str, Tensor], factor: float = factor, name: str = name) -> dict[str, Tensor]:
            made = dict(zip(graph.outputs, graph.run(*feed.values()), strict=True))
            return made | {name: made[name] * factor}

        if bias > -10 or name == exponential:  # a fiftieth of 6e-6 is less than ONNX Runtime's own error
            with pytest.raises(VerificationError, match=f"{name}: "):
                verify(tmp_path / "out", wrong, [{"x": x}], atol=None, rtol=None, graph=graph)


class Large(nn.Module):
    """Numbers that float16 has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * 1e5
        return y - y


def test_nan_in_float16_is_told_with_its_reason(tmp_path: Path) -> None:
    adapted = peftfx.transform(Large().half(), peftfx.LoRA(r=2, target="head"), inputs={"x": torch.ones(2, 4).half()})
    with pytest.raises(VerificationError, match=r"own code gives NaN; float16 has no numbers above 65504"):
        adapted.export(tmp_path / "out")


class Faint(nn.Module):
    """A norm of numbers so small that the epsilon which torch takes for their dtype decides."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.RMSNorm(6, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(1e-3 * self.layer(x))


@pytest.mark.parametrize("affine", [True, False])
def test_an_rms_norm_in_float64_has_the_epsilon_of_the_models_dtype(affine: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = peftfx.transform(Faint(affine), peftfx.LoRA(r=2, target="linear"), inputs={"x": torch.randn(2, 5, 6)})
    with warnings.catch_warnings(action="error"):
        report = adapted.export(tmp_path / "out")
    assert report.float32 is not None
    assert 0 < report.float32 < 1e-5


class Masked(nn.Module):
    """Scores of which some are masked, as those of TAPAS, whose masks are -10000 plus a score."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask, self.up, self.middle, self.out = mask, nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.out(self.middle(self.up(x).relu()).relu())[..., 0]
        return scores + self.mask * (x[..., 0] > 0.5)


@pytest.mark.parametrize("mask", [-1e4, torch.finfo(torch.float32).min], ids=["-10000", "least"])
def test_scores_beside_masks_are_compared(mask: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Masked(mask).eval(), torch.randn(2, 30, 8)
    report = peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x})
    assert {c["output"] for c in report.comparisons} == {"output", "output, but for masks"}
    spoil_captures(monkeypatch)
    with pytest.raises(VerificationError, match=r"output, but for masks: .* absolute"):
        peftfx.export_onnx(model, tmp_path / "spoiled", inputs={"x": x})
