"""The laws are tried on methods of patterns, on a model in which the pattern matches; wrong ones are found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, testing


@peftfx.pattern("gate.silu", x="batch length width")
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.up(x)))
        return out


@dataclass(frozen=True, kw_only=True)
class Beside(peftfx.PatternMethod):
    """A low-rank sum beside a SiLU."""

    peft_type: ClassVar[str] = "TEST_BESIDE"
    pattern: ClassVar[peftfx.Pattern] = silu
    r: int = 2

    def init(self, site: peftfx.sites.PatternSite, like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        a = torch.empty(self.r, 12, dtype=like.dtype, device=like.device).normal_(generator=rng)
        return {"a": a, "b": a.new_zeros(12, self.r)}

    def forward(
        self, site: peftfx.sites.PatternSite, x: Tensor, y: Tensor, p: dict[str, Tensor], training: bool
    ) -> Tensor:
        return y + x @ p["a"].T @ p["b"].T


class MovesAtOnce(Beside):
    """It is not neutral, and says nothing of it."""

    peft_type: ClassVar[str] = "TEST_MOVES"

    def forward(
        self, site: peftfx.sites.PatternSite, x: Tensor, y: Tensor, p: dict[str, Tensor], training: bool
    ) -> Tensor:
        return super().forward(site, x, y, p, training) + 3


class MixesRows(Beside):
    """What it gives for a row depends on the others."""

    peft_type: ClassVar[str] = "TEST_MIXES"

    def forward(
        self, site: peftfx.sites.PatternSite, x: Tensor, y: Tensor, p: dict[str, Tensor], training: bool
    ) -> Tensor:
        return super().forward(site, x + x.mean(0, keepdim=True), y, p, training)


@pytest.fixture(autouse=True)
def files_that_peft_cannot_load() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*peft cannot load")
        yield


MODEL, INPUTS = Gated(), {"x": torch.randn(2, 3, 8)}


def test_the_laws_hold_for_a_method_of_a_pattern() -> None:
    report = testing.check(Beside, model=MODEL, inputs=INPUTS)
    assert {f.name for f in report.findings if not f.skipped} >= {"neutral", "merge", "remove", "gradients", "onnx"}
    assert "all 12 laws hold, 1 skipped" in str(report)


@pytest.mark.parametrize(("cls", "law"), [(MovesAtOnce, "neutral"), (MixesRows, "sizes")])
def test_a_wrong_one_is_found(cls: type[Beside], law: str) -> None:
    with pytest.raises(AssertionError, match=f"broken  {law}"):
        testing.check(cls, model=MODEL, inputs=INPUTS)


def test_a_model_is_needed_in_which_the_pattern_matches() -> None:
    with pytest.raises(PeftfxError, match="tried where it matches"):
        testing.check(Beside)
    with pytest.raises(PeftfxError, match="no site that Beside acts at"):
        testing.check(Beside, model=nn.Sequential(nn.Linear(8, 8)), inputs={"input": torch.randn(2, 3, 8)})
    with pytest.raises(PeftfxError, match="go together"):
        testing.check(Beside, model=MODEL)


@pytest.mark.slow
def test_the_laws_of_any_method_run_on_a_model_of_ones_own() -> None:
    report = testing.check(peftfx.IA3, model=MODEL, inputs=INPUTS, configs=())
    assert "all" in str(report).partition("\n")[0]
