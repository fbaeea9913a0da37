"""Code that limits numbers where some are infinite, as models do in float16: the graph limits them there too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_model.checks import build
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.export.command import export_directory
from peftfx.graph.graph import Graph

pytestmark = pytest.mark.further

LIMIT = 60000.0
FINITE = torch.tensor([[1.0, 100.0], [65000.0, -3.0]], dtype=torch.float16)
INFINITE = torch.tensor([[1.0, 100.0], [65000.0, float("inf")]], dtype=torch.float16)


class Unless(nn.Module):
    """Limits numbers unless all are finite."""

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        if y.dtype == torch.float16 and not torch.isfinite(y).all():
            y = torch.clamp(y, min=-LIMIT, max=LIMIT)
        return y / 2


class If(nn.Module):
    """Limits numbers if some are infinite."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            x = x.clamp(-LIMIT, LIMIT)
        return x - 1


class Doubles(nn.Module):
    """Does something else if some numbers are infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if torch.isinf(x).any() else x


class Raises(nn.Module):
    """Takes no infinite numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.isinf(x).any():
            raise ValueError("infinite")
        if not torch.isfinite(x).all():
            raise ValueError("infinite, or no number")
        return 2 * x


def captured(model: nn.Module) -> Graph:
    return peftfx.capture(model.eval(), {"x": FINITE}, axes={"x": ("batch", None)})


@pytest.mark.parametrize("kind", [Unless, If])
def test_numbers_are_limited_in_the_calls_in_which_some_are_infinite(kind: type[nn.Module]) -> None:
    graph = captured(kind())
    for x in (FINITE, FINITE[:1], INFINITE, INFINITE[1:]):
        assert torch.equal(graph.run(x)[0], kind()(x))


def test_another_branch_on_infinite_numbers_is_refused() -> None:
    with pytest.raises(PeftfxError, match="branches on whether numbers are infinite, and does not clamp them"):
        captured(Doubles())


def test_code_that_only_raises_for_infinite_numbers_is_captured() -> None:
    assert torch.equal(captured(Raises()).run(FINITE)[0], 2 * FINITE)


def test_a_model_in_float16_is_exported_with_its_limits(tmp_path: Path) -> None:
    base = build("text2text-generation", "bart")
    base.config.name_or_path = ""
    base.save_pretrained(tmp_path / "base")
    export_directory(tmp_path / "base", tmp_path / "out", view="decode", dtype="fp16")
    own = type(base).from_pretrained(tmp_path / "base", dtype=torch.float16).eval()
    text, options = torch.tensor([[20, 21, 22, 23]]), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    served = runtime.load(tmp_path / "out")
    assert torch.equal(served.generate(input_ids=text, **options), own.generate(input_ids=text, **options))


def test_onnx_runtime_limits_them_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(If(), nn.Linear(2, 2)).half().eval()
    with torch.no_grad():
        model[1].weight.mul_(0.1)  # so that the results are finite
    peftfx.export_onnx(model, tmp_path / "out", inputs={"input": FINITE})
    served = runtime.load(tmp_path / "out")
    for x in (FINITE, FINITE[:1], INFINITE):
        want = model(x)
        assert bool(want.isfinite().all())
        torch.testing.assert_close(served(input=x)[0], want, rtol=1e-2, atol=1e-2)
