"""A mixture whose code loops over the experts that have tokens, behind a router that casts itself."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import peft
import pytest
import torch
from support.adapted import randomise
from support.mixtures import mixture
from torch import Tensor, nn
from torch.nn import functional as F

import peftfx
from peftfx import PeftfxError
from peftfx.export.metadata import ENGINE

WIDTH, EXPERTS = 8, 4


class Mixture(nn.Module):
    """Each token goes to one expert. The router computes in float32, whatever the model's dtype is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(WIDTH, WIDTH) for i in range(EXPERTS)})

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.router.to(torch.float32)
        chances = F.softmax(self.router(x.float()), -1)
        return self.mixed(x, F.one_hot(chances.argmax(-1), EXPERTS), chances.max(-1).values.to(x.dtype))

    def mixed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result, mask = torch.zeros_like(x), chosen[:, None].permute(2, 1, 0)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            _, token = torch.where(mask[expert].squeeze(0))
            made = self.experts[f"expert_{expert[0]}"](x[token]) * weights[token, None]
            result.index_add_(0, token, made)
        return result


class Skips(Mixture):
    """A turn without tokens ends early; one may do something more before."""

    idle = False

    def mixed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result, mask = torch.zeros_like(x), chosen.permute(1, 0)
        for expert in torch.greater(mask.sum(dim=-1), 0).nonzero(as_tuple=False):
            number = int(expert.item())
            (token,) = torch.where(mask[number])
            if self.idle and token.numel() == 0:
                result = result + 1
            if token.numel() == 0:
                continue
            result.index_add_(0, token, self.experts[f"expert_{number}"](x[token]))
        return result


class AddsWithoutTokens(Mixture):
    """A turn of the loop adds to all tokens."""

    def mixed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = super().mixed(x, chosen, weights)
        for expert in torch.greater(chosen.T.sum(dim=-1), 0).nonzero():
            result = result + self.experts[f"expert_{expert[0]}"].bias
        return result


class Stops(Mixture):
    """The loop ends at the first expert that has tokens."""

    def mixed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result, mask = torch.zeros_like(x), chosen.T
        for expert in torch.greater(mask.sum(dim=-1), 0).nonzero():
            (token,) = torch.where(mask[expert].squeeze(0))
            result.index_add_(0, token, self.experts[f"expert_{expert[0]}"](x[token]))
            break
        return result


class ReadsAnotherMask(Mixture):
    """The loop is over the experts of some tokens, and adds rows to other tokens."""

    def mixed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result, mask = torch.zeros_like(x), chosen.T
        for expert in torch.greater((1 - mask).sum(dim=-1), 0).nonzero():
            (token,) = torch.where(mask[expert].squeeze(0))
            result.index_add_(0, token, self.experts[f"expert_{expert[0]}"](x[token]))
        return result


class OneMoreClass(Mixture):
    """A class of padding is counted, for which there is no expert. Nothing chooses it."""

    def forward(self, x: Tensor) -> Tensor:
        chances = F.softmax(self.router(x), -1)
        result, mask = torch.zeros_like(x), F.one_hot(self.chosen(chances), EXPERTS + 1).permute(1, 0)
        for expert in torch.greater(mask.sum(dim=-1), 0).nonzero():
            (token,) = torch.where(mask[expert[0]])
            result.index_add_(0, token, self.experts[f"expert_{expert[0]}"](x[token]))
        return result

    def chosen(self, chances: Tensor) -> Tensor:
        """The numbers of the experts."""
        return chances.topk(1, dim=-1).indices[:, 0]


class ArgMax(OneMoreClass):
    def chosen(self, chances: Tensor) -> Tensor:
        return chances.argmax(-1)


class ComputesTheClass(OneMoreClass):
    """Padding may be chosen, as far as the operators tell."""

    def chosen(self, chances: Tensor) -> Tensor:
        return (chances[:, 0] > 2).long() + chances.argmax(-1)


AXES = {"x": ("tokens", None)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capture_runs_each_expert_on_its_tokens(dtype: torch.dtype) -> None:
    model = Mixture().eval().to(dtype)
    graph = peftfx.capture(model, {"x": torch.ones(5, WIDTH, dtype=dtype)}, axes=AXES)
    assert model.router.weight.dtype == dtype, "the capture has cast the model's own layer"
    for tokens in (1, 2, 7):  # one token leaves three experts without any
        x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        want = model(x).float()
        model.to(dtype)
        assert want.abs().max() > 0.1
        torch.testing.assert_close(graph.run(x)[0].float(), want, atol=1e-5, rtol=1e-2)
    assert {site.path for site in graph.sites} == {"router", *(f"experts.expert_{i}" for i in range(EXPERTS))}


@pytest.mark.parametrize("kind", [AddsWithoutTokens, Stops, ReadsAnotherMask])
def test_a_loop_whose_turns_do_more_is_refused(kind: type[Mixture]) -> None:
    with pytest.raises(PeftfxError, match="its code loops over the places where a mask is true"):
        peftfx.capture(kind().eval(), {"x": torch.ones(5, WIDTH)}, axes=AXES)


@pytest.mark.parametrize("kind", [OneMoreClass, ArgMax])
def test_a_class_that_cannot_be_chosen_has_no_turn(kind: type[Mixture]) -> None:
    model = kind().eval()
    graph = peftfx.capture(model, {"x": torch.ones(5, WIDTH)}, axes=AXES)
    for tokens in (1, 6):
        x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(graph.run(x)[0], model(x))


def test_a_class_without_an_expert_that_may_be_chosen_is_refused() -> None:
    with pytest.raises(PeftfxError, match="expert_4"):
        peftfx.capture(ComputesTheClass().eval(), {"x": torch.ones(5, WIDTH)}, axes=AXES)


def test_a_turn_without_tokens_may_be_skipped() -> None:
    model = Skips().eval()
    graph = peftfx.capture(model, {"x": torch.ones(5, WIDTH)}, axes=AXES)
    for tokens in (1, 6):
        x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(graph.run(x)[0], model(x))
    model.idle = True
    with pytest.raises(PeftfxError, match="branches on the values of a tensor"):
        peftfx.capture(model, {"x": torch.ones(5, WIDTH)}, axes=AXES)


def test_other_code_is_as_before_after_a_capture() -> None:
    before = nn.Module._apply, torch.nonzero, torch.Tensor.nonzero, torch.Tensor.__iter__, torch.Tensor.__format__
    peftfx.capture(Mixture().eval(), {"x": torch.ones(5, WIDTH)}, axes=AXES)
    after = nn.Module._apply, torch.nonzero, torch.Tensor.nonzero, torch.Tensor.__iter__, torch.Tensor.__format__
    assert before == after


def test_a_lora_of_peft_on_router_and_experts_is_exported(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["router", *(f"expert_{i}" for i in range(EXPERTS))])
    wanted = peft.get_peft_model(Mixture(), config).eval()
    randomise(wanted)
    wanted.save_pretrained(str(tmp_path / "adapter"))
    inputs = {"x": torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))}
    ours = peftfx.load(Mixture().eval(), tmp_path / "adapter", inputs=inputs)
    ours.export(tmp_path / "out", inputs=inputs)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map[ENGINE] == "fast"
    for tokens in (1, 6):
        x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        want = wanted(x)
        assert (want - Mixture()(x)).abs().max() > 0.01
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), want, atol=1e-5, rtol=1e-4)


def test_transformers_own_loop_over_experts_is_captured() -> None:
    model = mixture("mixtral")
    model.set_experts_implementation("eager")
    graph = peftfx.capture(model)
    ids = torch.randint(64, (1, 2), generator=torch.Generator().manual_seed(3))
    got = graph.run(ids, torch.ones_like(ids))[0]
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-4)
