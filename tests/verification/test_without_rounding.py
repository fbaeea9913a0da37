"""Half precision hides small faults in its own rounding. Without the rounding they are seen."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_model.checks import build
from torch import Tensor, nn
from verification.spoiled import one_percent_more, spoil_captures

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.export.steps import verification
from peftfx.export.translation import stamped
from peftfx.export.verification import without_rounding
from peftfx.export.verification.captured import refused
from peftfx.export.verification.comparison import Comparison, VerificationError
from peftfx.export.verification.sizes.trial import BRANCHES, SAME, Trial
from peftfx.export.verification.tolerances.float64 import float32, float64
from peftfx.graph.graph import Graph
from peftfx.graph.lazy_weights import store
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.capture import capture

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)


def lora(kind: torch.dtype) -> peftfx.AdaptedModel:
    return peftfx.transform(
        build("text-generation", "llama").to(kind), peftfx.LoRA(r=4, target="all-linear", init_lora_weights=False)
    )


@pytest.mark.parametrize(
    ("kind", "merge"),
    [
        (torch.float16, True),
        *(pytest.param(torch.bfloat16, merge, marks=pytest.mark.further) for merge in (False, True)),
        pytest.param(torch.float16, False, marks=pytest.mark.further),
    ],
)
def test_one_percent_at_one_layer_is_seen(
    kind: torch.dtype, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = stamped.prepare

    def spoiled(graph: Graph) -> Graph:
        ready = prepare(graph)
        one_percent_more(ready)
        return ready

    monkeypatch.setattr(stamped, "prepare", spoiled)
    with pytest.raises(VerificationError, match="without rounding to half precision"):
        lora(kind).export(tmp_path / "out", view="forward", merge=merge)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(verification, "runs_without_rounding", lambda base: False)
    lora(kind).export(tmp_path / "out", view="forward", merge=merge)  # the measured tolerance alone does not see it


def test_a_graph_that_is_not_the_models_own_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_captures(monkeypatch)
    with pytest.warns(PeftfxWarning, match="the model's own code and its graph differ in logits"):
        lora(torch.float16).export(tmp_path / "out", view="forward", merge=False)


class Numbers(torch.nn.Module):
    """Numbers that half precision rounds, in each kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.first(x) + 1.3 - 0.7) * 0.3 / 0.9
        h = h.clamp(-0.333, 0.777).masked_fill(x > 0.1, 0.123)
        return torch.where(x < -0.1, 0.0271, h) + torch.full_like(h, 0.457)


@pytest.mark.parametrize("kind", HALVES)
def test_numbers_in_a_models_code_are_no_faults(kind: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peftfx.export_onnx(Numbers().eval().to(kind), tmp_path / "out", inputs={"x": torch.randn(64, 8).to(kind)})


def test_a_model_in_half_precision_computes_in_float32_or_float64() -> None:
    """The modes take the place of a copy of the model: a weight is widened where it is read."""
    base = build("text-generation", "qwen3_moe").half()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with float32():
            single = base(ids).logits
        with float64():
            double = base(ids).logits
        want = base.float()(ids).logits
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(double.float(), want, atol=1e-5, rtol=1e-5)


class Weighs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_weights_of_a_file_in_float32_are_rounded_wherever_they_are_read() -> None:
    """Also where torch looks at the dtypes of the operands before any operator, as at a conv."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 5, 1)).requires_grad_(False)
    stored, x = copy.deepcopy(whole), torch.randn(2, 4, 9).bfloat16()
    store(stored, lambda name: torch.bfloat16)
    for mode, dtype in ((float64, torch.float64), (float32, torch.float32)):
        with mode(rounded=True):
            got = stored(x)
        torch.testing.assert_close(got, copy.deepcopy(whole).bfloat16().to(dtype)(x.to(dtype)))
        with mode():
            exact = stored(x)
        torch.testing.assert_close(exact, copy.deepcopy(whole).to(dtype)(x.to(dtype)))


@pytest.mark.parametrize(
    ("own", "answer"),
    [(lambda y: y + 300 - 300, SAME), (lambda y: y * 1.05, BRANCHES), (lambda y: y * 1.004, BRANCHES)],
)
def test_float64_decides_whether_half_precision_differs_by_rounding_alone(
    own: Callable[[Tensor], Tensor], answer: str
) -> None:
    """Code and graph that choose other experts, because they round otherwise, are the same code."""
    model, call = Weighs(), {"x": torch.randn(4, 8).bfloat16()}
    trial = Trial(
        capture(model, call), lambda sizes: call, lambda feed: [own(model(feed["x"]))], lambda name, feed, v: v, {}, 8
    )
    with torch.no_grad():
        assert trial.answer(call) == answer


def test_what_is_exact_without_rounding_is_not_told_to_say_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Comparison, "says_little", property(lambda self: True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        lora(torch.float16).export(tmp_path / "out", view="forward")
    monkeypatch.setattr(verification, "runs_without_rounding", lambda base: False)
    with pytest.warns(PeftfxWarning, match="says little"):
        lora(torch.float16).export(tmp_path / "other", view="forward")


@pytest.mark.parametrize(
    ("view", "hint"), [("decode", "export its forward view"), ("forward", "call the model itself")]
)
def test_a_model_that_runs_in_no_view_is_not_told_to_export_the_forward(view: str, hint: str) -> None:
    """As a model whose code mixes dtypes in half precision."""
    seen = dataclasses.make_dataclass("Seen", ["name"])(view)
    assert hint in str(refused(lora(torch.float16), seen, RuntimeError("float != Half")))


def test_a_twin_is_mapped_by_the_size_of_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bool] = []

    def seen(twin: Path, *, mapped: bool) -> OnnxModel:
        opened.append(mapped)
        return OnnxModel(twin, mapped=mapped)

    monkeypatch.setattr(without_rounding, "OnnxModel", seen)
    monkeypatch.setattr(without_rounding, "is_mapped", lambda path, times=1: times * 200 > 256)  # of 200 MB
    lora(torch.float16).export(tmp_path / "out", view="forward")
    assert opened == [True]
