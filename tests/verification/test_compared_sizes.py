"""An export is compared at a size of 1 along every free axis of a user's own module, and at a text of many tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_model.checks import build
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export.deployment.parts import GraphPart
from peftfx.export.steps import steps
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.oracle import measured_of
from peftfx.export.verification.probes import trials_of
from peftfx.model.api import bare
from peftfx.views.view import LONG_TEXT

_aten = torch.ops.aten


class Spread(nn.Module):
    """A layer, and how its values differ along an axis; nothing tells one value from several in the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(1, keepdim=True)


def test_every_free_axis_has_one_place_in_a_comparison(tmp_path: Path) -> None:
    report = peftfx.export_onnx(Spread().eval(), tmp_path / "out", inputs={"x": torch.randn(2, 7, 4)})
    assert {"x": [1, 1, 4]} in report.probes


def test_what_is_wrong_for_one_place_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Line(Spread):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.linspace(2.0, 3.0, x.shape[1])[:, None]

    def wrong(start: float, end: float, steps: int, **_: object) -> Tensor:
        return start + (end - start) * (torch.arange(steps) + (steps < 2)) / (steps - 1 + (steps < 2))

    from peftfx.graph.capturing.sizes import free_arguments

    stand_ins = {**free_arguments._STAND_INS, torch.linspace: wrong}
    monkeypatch.setattr(free_arguments, "_STAND_INS", stand_ins)
    with pytest.raises(PeftfxError, match=r"differs|disagrees|branches"):
        peftfx.export_onnx(Line().eval(), tmp_path / "out", inputs={"x": torch.randn(2, 7, 4)})


class Joined(nn.Module):
    """A large table, sounds of more than eight places, and texts whose axis goes where there is one token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100_000, 80)
        self.layer = nn.Linear(80, 4)

    def forward(self, sounds: Tensor, tokens: Tensor) -> Tensor:
        if sounds.shape[1] > 8:
            sounds = sounds[:, :8]
        return (self.layer(self.table(tokens)) + sounds.mean((1, 2))[:, None, None]).squeeze(1)


def test_a_size_of_one_is_tried_where_the_usual_sizes_are_too_large_and_the_least_are_on_another_side(
    tmp_path: Path,
) -> None:
    inputs = {"sounds": torch.randn(2, 400, 1), "tokens": torch.randint(9, (2, 5))}
    with pytest.raises(PeftfxError, match=r"right only where tokens.1 != 1 \[squeeze, in the model\]"):
        peftfx.export_onnx(Joined().eval(), tmp_path / "out", inputs=inputs)


class Halved(nn.Module):
    """A layer in half precision whose numbers are given in float32. One place is scaled behind the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32, bias=False, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return (self.layer(x) * 0.3).float()
        return self.layer(x * 0.3).float()


def test_float32_of_a_model_in_half_precision_is_as_good_as_half_precision(tmp_path: Path) -> None:
    """It was held to float32's rounding, and the branch was taken for one that computes something else."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 64, dtype=torch.float16)
    report = peftfx.export_onnx(Halved().eval(), tmp_path / "out", inputs={"x": x})
    assert not report.sizes


def test_the_call_that_sets_the_tolerance_of_a_larger_model_is_its_longest_text() -> None:
    """It was the one with the longest cache, whose one token has less noise: SmolLM2 with slots was refused."""
    with torch.device("meta"):
        adapted = bare(nn.Linear(1 << 14, 1 << 13), {"input": torch.zeros(1, 1 << 14)})

    def call(batch: int, tokens: int, past: int) -> dict[str, Tensor]:
        text = {"input_ids": torch.ones(batch, tokens), "attention_mask": torch.ones(batch, past + tokens)}
        cache = {"past_key_values.0.key": torch.zeros(batch, 3, past, 64)}
        return {name: value.long() for name, value in text.items()} | cache

    assert measured_of(adapted, [call(1, 5, 0), call(3, 36, 0), call(4, 1, 7)], adapted.graph()) == {1}


@pytest.mark.further
def test_what_is_wrong_for_long_texts_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = steps.ExportSteps.captured

    def spoiled(self: steps.ExportSteps) -> tuple[steps.ExportSteps, list[GraphPart]]:
        work, parts = captured(self)
        logarithms = [node for node in parts[-1].graph.nodes() if node.target is _aten.log.default]
        assert len(logarithms) == 1
        logarithms[0].target = _aten.neg.default
        parts[-1].graph.module.recompile()
        return work, parts

    monkeypatch.setattr(steps.ExportSteps, "captured", spoiled)
    adapted = peftfx.transform(build("text2text-generation", "t5"), peftfx.LoRA(r=2), seed=0)
    with pytest.raises(VerificationError, match="disagrees"):
        adapted.export(tmp_path / "out", view="decode")


def test_only_the_long_text_is_shortened_where_a_model_takes_few_tokens() -> None:
    model = build("text-generation", "gpt2")
    model.config.n_positions = 48
    adapted = peftfx.transform(model, peftfx.LoRA(r=2))

    class View:
        trials = ({"batch": 3, "sequence": LONG_TEXT}, {"batch": 2, "sequence": 30 + 6})

    assert [own["sequence"] for own in trials_of(adapted, View())] == [24, 36]
    model.config.n_positions = 4096
    assert [own["sequence"] for own in trials_of(adapted, View())] == [36, 36]


class Pairs(nn.Module):
    """Every value of a row beside every other, as attention over a large picture has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4200)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y[:, :, None] * y[:, None] + x.mean()).amax(2)


class Attention(Pairs):
    """As many pairs, within one operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)[:, None, :, None]
        return nn.functional.scaled_dot_product_attention(y, y, y)


@pytest.mark.parametrize("kind", [Pairs, Attention])
def test_heavy_calls_are_few_and_of_few_rows(kind: type[Pairs], tmp_path: Path) -> None:
    """Three pictures of 1024 x 1024 pixels through SAM ran out of 23 GB, in float64. VideoMAE's calls took minutes."""
    report = peftfx.export_onnx(kind().eval(), tmp_path / "out", inputs={"x": torch.randn(5, 16)})
    assert [c["float32"] is not None for c in report.comparisons] == [True, False]
    assert report.probes == [{"x": [1, 16]}, {"x": [2, 16]}]
