"""Pattern methods that do what a weight can do: merged, exported and put into slots; or kept beside, with a reason."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftfx
from peftfx import PeftfxError
from peftfx.contract.update import Update
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.patterns.pattern import Pattern, forget, known_patterns
from peftfx.sites.site import PatternSite


class Scales(peftfx.PatternMethod):
    """A scale of what a pattern gives."""

    def init(self, site: PatternSite, like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"scale": like.new_ones(site.width)}

    def forward(self, site: PatternSite, x: Tensor, y: Tensor, p: peftfx.method.Params, training: bool) -> Tensor:
        return y * p["scale"]


@pytest.fixture(autouse=True)
def _alone(swiglu: Pattern) -> Iterator[None]:
    yield
    forget([pattern.name for pattern in known_patterns() if pattern is not swiglu])


@pytest.fixture(scope="module")
def louder(swiglu: Pattern) -> type[peftfx.PatternMethod]:
    """A scale of every SwiGLU."""

    @peftfx.register
    @dataclass(frozen=True, kw_only=True)
    class Louder(Scales):
        peft_type: ClassVar[str] = "LOUDER"
        pattern: ClassVar[Pattern] = swiglu

        def folds(self, site: PatternSite) -> tuple[str, ...]:
            return ("down",)

        def update(self, site: PatternSite, name: str, p: peftfx.method.Params) -> Update:
            return Update(outer=p["scale"])

    return Louder


class Feed(nn.Module):
    """Two SwiGLUs; the last layer of the first may run once more, and may be the second one's too."""

    def __init__(self, *, again: bool = False, shares: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.again = Gated(), Gated(), again
        if shares:
            self.second.down = self.first.down

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(x + self.first(x))
        return x + self.first.down(F.relu(self.first.up(x))) if self.again else x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


X = torch.linspace(-1, 1, 48).view(2, 3, 8)


def stirred(model: nn.Module, rules: str, inputs: dict[str, object] | None = None) -> peftfx.AdaptedModel:
    """A model with an adapter that does something."""
    torch.manual_seed(0)
    adapted = peftfx.transform(model, rules, inputs=inputs or {"x": X}, seed=0)
    for p in adapted.adapters.parameters():
        nn.init.uniform_(p, -0.4, 0.4)
    return adapted


@pytest.mark.parametrize("rules", ["louder; lora(r=2)@mlp", "lora(r=2)@mlp; louder"])
def test_what_a_weight_does_is_merged_into_it_over_what_acts_there(
    rules: str, louder: type[peftfx.PatternMethod], tmp_path: Path
) -> None:
    model = Feed().eval()
    adapted, before = stirred(model, rules), model(X)
    assert adapted.road == "modules"
    want = adapted(X)
    torch.testing.assert_close(adapted.graph({"x": X})(x=X), want, atol=1e-6, rtol=1e-5)
    assert (want - before).abs().max() > 0.01
    adapted.merge_adapter()
    torch.testing.assert_close(model(X), want, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(model(X), before)
    report = adapted.export(tmp_path / "onnx", inputs={"x": X})
    assert report.tensors == {"merged into weights": 14}
    got = peftfx.runtime.load(tmp_path / "onnx")(x=X)
    torch.testing.assert_close(torch.as_tensor(next(iter(got.values()))), want, atol=1e-5, rtol=1e-5)


def test_a_graph_with_slots_takes_it_as_a_scale(louder: type[peftfx.PatternMethod], tmp_path: Path) -> None:
    model = Feed().eval()
    peftfx.export_onnx(model, tmp_path / "graph", inputs={"x": X}, slots="all-linear")
    adapted = stirred(model, "lora(r=2)@mlp; louder")
    file = export_adapter(adapted, tmp_path / "graph", tmp_path / "adapter")  # held against torch
    served = peftfx.runtime.load(tmp_path / "graph")
    served.load_adapter(file)
    got = served(x=X)
    torch.testing.assert_close(torch.as_tensor(next(iter(got.values()))), adapted(X), atol=1e-5, rtol=1e-5)


def test_what_is_not_all_in_weights_stays_beside_them(louder: type[peftfx.PatternMethod], tmp_path: Path) -> None:
    model = Feed(again=True).eval()
    adapted = stirred(model, "louder@first.swiglu.0")
    with pytest.raises(PeftfxError, match=r"first\.down, of which down is the weight, runs elsewhere too"):
        adapted.merge_adapter()
    report = adapted.export(tmp_path / "onnx", inputs={"x": X})
    assert report.tensors == {"made constants": 1}
    adapted = stirred(Feed().eval(), "lily(r=2)@mlp.down; louder")
    with pytest.raises(PeftfxError, match="Lily"):
        adapted.merge_adapter()


def test_a_module_in_two_places_is_untied(louder: type[peftfx.PatternMethod]) -> None:
    model = Feed(shares=True).eval()
    adapted = stirred(model, "louder@first.swiglu.0")
    want = adapted(X)
    adapted.merge()
    torch.testing.assert_close(model(X), want, atol=1e-5, rtol=1e-5)
    assert model.first.down is not model.second.down


def test_a_weight_that_is_stored_turned_and_its_bias() -> None:
    @peftfx.pattern("test.turned", x="n d", down="d e", bias="e")
    def turned(x: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, down)

    @peftfx.register
    @dataclass(frozen=True, kw_only=True)
    class Times(Scales):
        peft_type: ClassVar[str] = "TIMES"
        pattern: ClassVar[Pattern] = turned

        def folds(self, site: PatternSite) -> tuple[str, ...]:
            return ("down", "bias")

        def update(self, site: PatternSite, name: str, p: peftfx.method.Params) -> Update:
            return Update(inner=p["scale"]) if name == "down" else Update(outer=p["scale"])

    model = nn.Sequential(Conv1D(5, 8), nn.ReLU(), Conv1D(3, 5)).eval()
    nn.init.uniform_(model[0].bias)
    with pytest.raises(PeftfxError, match="Times acts within this layer, whose whole output LoRA adapts"):
        stirred(copy.deepcopy(model), "times; lora(r=2)@linear", {"input": X})(X)
    adapted = stirred(model, "times", {"input": X})
    want = adapted(X)
    adapted.merge()
    torch.testing.assert_close(model(X), want, atol=1e-5, rtol=1e-5)


def test_a_fold_that_is_no_weight_is_told(louder: type[peftfx.PatternMethod], monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = stirred(Feed().eval(), "louder")
    monkeypatch.setattr(louder, "fold", lambda self, site, name, weight, p: weight[:2])
    with pytest.raises(PeftfxError, match=r"Louder\.fold gave \[2, 12\] for down, which is \[8, 12\]"):
        adapted.merge_adapter()
    monkeypatch.setattr(louder, "folds", lambda self, site: ("low",))
    with pytest.raises(PeftfxError, match="this match of swiglu has no operand 'low'"):
        adapted.merge_adapter()
