"""Code with a backward of its own: modules have its gradients, and a graph that lacks them says so."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.model.adapted import AdaptedModel
from peftfx.views.capturing.own_backwards import own_backwards

LORA = peftfx.LoRA(r=2, target_modules=["one", "two"], init_lora_weights=False)


class Steps(Function):
    """Rounds to quarters, with the gradient of a line."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Layers(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(6, 6), nn.Linear(6, 3), between

        if between == "module hook":
            self.one.register_full_backward_pre_hook(lambda module, given: (given[0].clamp(-0.1, 0.1),))

    def forward(self, x: Tensor) -> Tensor:
        if self.between == "checkpoint":
            x = checkpoint(self.one, x, use_reentrant=True) + checkpoint(self.rounded, x, use_reentrant=True)
        else:
            x = self.one(x)
        if self.between == "hook" and x.requires_grad:
            x.register_hook(lambda given: given.clamp(-0.1, 0.1))
        if self.between == "write":
            y = x.clone()
            with torch.no_grad():
                y[:, 2:].mul_(3)
            x = x + y
        if self.between == "inference":
            with torch.inference_mode():
                y = self.one(x)
            x = x + y.clone()
        if self.between == "no inference":
            with torch.inference_mode(False):
                x = x + self.one(x)
        return self.two(Steps.apply(x) if self.between == "function" else x)

    def rounded(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x))


def gradients(model: AdaptedModel, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    model(x=x).pow(2).sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("between", "named"),
    [
        ("function", "Steps"),
        ("hook", "Tensor.register_hook"),
        ("module hook", "a backward hook of one"),
        ("write", "mul_ under torch.no_grad"),
    ],
)
def test_a_graph_without_a_backward_of_the_codes_own_says_so(between: str, named: str) -> None:
    x = torch.randn(4, 6)
    model = peftfx.transform(Layers(between), LORA, inputs={"x": x.requires_grad_()})
    with warnings.catch_warnings(action="error"):
        want = gradients(model, x)
    assert model.road == "modules"
    model.wanted = "graph"
    with pytest.warns(PeftfxWarning, match=rf"backward of its own \({named}\).*train with road=.modules") as told:
        got = gradients(model, x)
    assert told[0].filename == __file__
    assert not torch.allclose(got[0], want[0])  # type: ignore[arg-type]
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        model(x=x)


@pytest.mark.parametrize("between", ["checkpoint", "inference", "no inference"])
def test_a_graph_has_the_gradients_of_layers_under_a_checkpoint_or_inference_mode(between: str) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    model = peftfx.transform(Layers(between), LORA, inputs={"x": x}, road="modules")
    want = gradients(model, x)
    model.wanted = "graph"
    with warnings.catch_warnings(action="error"):
        got = gradients(model, x)
    assert len(got) == len(want) == 4
    torch.testing.assert_close(got, want)


class Regions(nn.Module):
    """Two layers, and between them a part under `torch.no_grad`."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.one, self.two, self.part = nn.Linear(6, 6), nn.Linear(6, 3), part

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y + getattr(self, self.part)(x, y))

    def nested(self, x: Tensor, y: Tensor) -> Tensor:
        w = y.clone()
        with torch.no_grad():
            z = self.one(y)
            with torch.enable_grad():
                w.mul_(3)
                z = z + self.one(w)
        return z + w

    def given_back(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return y.to(y.dtype)

    def copied(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return y.to(y.dtype, copy=True)

    def laid_out_anew(self, x: Tensor, y: Tensor) -> Tensor:
        z = y.T
        with torch.no_grad():
            z = z.contiguous()
        return z.T

    def input_written(self, x: Tensor, y: Tensor) -> Tensor:
        z = x.clone()
        with torch.no_grad():
            z.mul_(3)
        return z


@pytest.mark.parametrize("part", ["nested", "given_back", "copied", "laid_out_anew", "input_written"])
def test_a_graph_has_the_gradients_of_code_under_no_grad(part: str) -> None:
    x = torch.randn(4, 6)
    model = peftfx.transform(Regions(part), LORA, inputs={"x": x}, road="modules")
    want = gradients(model, x)
    model.wanted = "graph"
    with warnings.catch_warnings(action="error"):
        got = gradients(model, x)
    torch.testing.assert_close(got, want)


def test_during_a_capture_other_threads_have_torchs_own() -> None:
    def train() -> Tensor:
        x = torch.ones(3, requires_grad=True)
        y = Steps.apply(x)
        y.retain_grad()
        y.register_hook(lambda given: given * 5)
        y.sum().backward()
        with torch.inference_mode():
            assert torch.ones(1).is_inference()
        return x.grad + y.grad

    with own_backwards(nn.Linear(2, 2)) as found, ThreadPoolExecutor(1) as pool:
        assert pool.submit(train).result().tolist() == [2 * 5 + 5] * 3
    assert not found


def test_an_apply_that_c_defines_is_called_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own is from 2.15 on; before that, `Function` has one of Python's over it."""
    monkeypatch.setattr(Function, "apply", torch._C._FunctionBase.__dict__["apply"])
    x = torch.randn(4, 6)
    model = Layers("function")
    torch.testing.assert_close(peftfx.capture(model, {"x": x})(x=2 * x), model(2 * x))
    assert Function.__dict__["apply"] is torch._C._FunctionBase.__dict__["apply"]
