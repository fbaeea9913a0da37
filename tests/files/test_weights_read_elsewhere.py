"""Weights that a model's code reads past their layer's call, and parameters without a layer."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx as px
from peftfx.errors import PeftfxError, PeftfxWarning

CALLS = [
    torch.tensor([[1, 5, 9, 7], [3, 3, 2, 0]]),
    torch.tensor([[19]]),
    torch.tensor([[4, 1, 1], [5, 5, 2], [0, 7, 3]]),
]


class TiedByHand(nn.Module):
    """A language model whose head is a product with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.embedding(ids))), self.embedding.weight)


class Autoencoder(nn.Module):
    """A layer, whose weight decodes too, the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(20, 8), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.encoder(self.embedding(ids))) @ self.encoder.weight


class ComputedBiases(nn.Module):
    """Layers whose biases the code computes, as in BEiT and EVA of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.qkv, self.out = nn.Embedding(20, 8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.first, self.last = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, ids: Tensor) -> Tensor:
        bias = torch.cat([self.first, torch.zeros_like(self.first), self.last])
        query, key, value = F.linear(self.embedding(ids), self.qkv.weight, bias).chunk(3, -1)
        mixed = self.out(F.scaled_dot_product_attention(query, key, value))
        return F.conv1d(mixed.mT, self.conv.weight, 2 * self.first, padding=1).mT


class Bare(nn.Module):
    """Parameters without a layer, in a module of the model's own."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8)), again

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.first)) @ self.second
        return y + self.first.sum() if self.again else y


class WithBare(nn.Module):
    """A model with such a module."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.embedding, self.inner, self.bare = nn.Embedding(20, 8), nn.Linear(8, 8), Bare(again=again)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.bare(self.embedding(ids)))


def _trained(base: nn.Module, config: peft.PeftConfig, directory: Path) -> nn.Module:
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for n, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.3)
    model.save_pretrained(str(directory))
    return model


def _run(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)
    return found


def _exported(adapted: px.AdaptedModel, directory: Path) -> ort.InferenceSession:
    px.export_onnx(adapted, directory, merge=True)
    return ort.InferenceSession(directory / "model.onnx")


def _assert_served(session: ort.InferenceSession, want: nn.Module) -> None:
    for ids in CALLS:
        (got,) = session.run(None, {"ids": ids.numpy()})
        np.testing.assert_allclose(got, _run(want, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embedding", "inner"]},
        {"target_modules": ["inner"], "modules_to_save": ["embedding"]},
        {"target_modules": ["inner"], "trainable_token_indices": {"embedding": [1, 5, 19]}},
    ],
)
def test_an_embedding_that_is_the_head_too_acts_as_in_peft(options: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = TiedByHand().eval()
    want = _trained(base, peft.LoraConfig(r=2, init_lora_weights=False, **options), tmp_path / "theirs")
    adapted = px.load(base, tmp_path / "theirs", inputs={"ids": CALLS[0]}).eval()
    for ids in CALLS:
        torch.testing.assert_close(_run(adapted, ids), _run(want, ids), rtol=1e-5, atol=1e-5)
    adapted.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(_run(again, CALLS[2]), _run(want, CALLS[2]), rtol=1e-5, atol=1e-5)
    _assert_served(_exported(adapted, tmp_path / "onnx"), want)


def test_rows_alone_of_an_embedding_that_is_the_head_too_act_as_peft_merges_them(tmp_path: Path) -> None:
    base = TiedByHand().eval()
    config = peft.TrainableTokensConfig(target_modules=["embedding"], token_indices=[1, 5, 19])
    want = _trained(base, config, tmp_path / "theirs").merge_and_unload()
    with pytest.warns(PeftfxWarning, match="at embedding: the model's code also reads its weight past its call"):
        adapted = px.load(base, tmp_path / "theirs", inputs={"ids": CALLS[0]}).eval()
    for ids in CALLS:
        torch.testing.assert_close(_run(adapted, ids), _run(want, ids), rtol=1e-5, atol=1e-5)
    _assert_served(_exported(adapted, tmp_path / "onnx"), want)


def test_a_layer_whose_weight_decodes_too_is_adapted_where_it_is_called(tmp_path: Path) -> None:
    base = Autoencoder().eval()
    want = _trained(base, peft.LoraConfig(r=2, target_modules=["encoder"]), tmp_path / "theirs")
    adapted = px.load(base, tmp_path / "theirs", inputs={"ids": CALLS[0]}).eval()
    for ids in CALLS:
        torch.testing.assert_close(_run(adapted, ids), _run(want, ids), rtol=1e-5, atol=1e-5)
    _assert_served(_exported(adapted, tmp_path / "onnx"), want)


@pytest.mark.parametrize(("model", "target"), [(TiedByHand, "head"), (Autoencoder, "head")])
def test_a_use_of_another_layers_weight_is_refused_as_a_place_of_its_own(model: type[nn.Module], target: str) -> None:
    with pytest.raises(PeftfxError, match="reads this parameter in another place too"):
        px.transform(model(), px.LoRA(r=2, target=target), inputs={"ids": CALLS[0]})


def test_a_parameter_that_other_code_reads_is_refused_in_target_parameters(tmp_path: Path) -> None:
    base = WithBare(again=True).eval()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["bare.first"], init_lora_weights=False)
    _trained(base, config, tmp_path)
    with pytest.raises(PeftfxError, match=r"reads this parameter in another place too \(sum\)"):
        px.load(base, tmp_path, inputs={"ids": CALLS[0]})


def test_a_parameter_without_a_layer_is_saved_as_peft_loads_it(tmp_path: Path) -> None:
    base = WithBare().eval()
    rule = px.LoRA(r=2, target="bare.first | inner", init_lora_weights=False)
    adapted = px.transform(base, rule, inputs={"ids": CALLS[0]}, seed=1).eval()
    adapted.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ours = px.load(copy.deepcopy(base), tmp_path, inputs={"ids": CALLS[0]}).eval()
    for ids in CALLS:
        torch.testing.assert_close(_run(theirs, ids), _run(adapted, ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(_run(ours, ids), _run(adapted, ids), rtol=1e-5, atol=1e-5)


def test_a_parameter_that_peft_cannot_adapt_is_told_when_it_is_saved(tmp_path: Path) -> None:
    base = WithBare().eval()
    rule = px.LoRA(r=2, target="bare.second", init_lora_weights=False)
    adapted = px.transform(base, rule, inputs={"ids": CALLS[0]}).eval()
    with pytest.warns(PeftfxWarning, match=r"bare\.second: HF PEFT has no layer there"):
        adapted.save_pretrained(tmp_path)
    again = px.load(copy.deepcopy(base), tmp_path, inputs={"ids": CALLS[0]}).eval()
    torch.testing.assert_close(_run(again, CALLS[2]), _run(adapted, CALLS[2]))


def test_a_layer_with_a_parametrised_weight_is_refused_with_the_reason() -> None:
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))).eval()
    with pytest.raises(PeftfxError, match="computed from others"):
        px.transform(base, px.LoRA(target_modules=["0"]), inputs={"input": torch.randn(2, 8)})


class Tables(nn.Module):
    """Embeddings that are never called: one is the head, and the other one is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.places = nn.Linear(8, 8), nn.Embedding(20, 8), nn.Embedding(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(x) + self.places.weight[: x.shape[1]]), self.head.weight)


ROWS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))


def test_embeddings_that_are_only_read_get_no_training_in_peft(tmp_path: Path) -> None:
    """Their factors in the file were "unexpected", because this call has no embedding at all."""
    base = Tables()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["inner", "head", "places"]))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        theirs(ROWS).square().sum().backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(PeftfxWarning, match=r"reads weights, and makes no call, of .* head\.lora_embedding_A"):
        ours = px.load(copy.deepcopy(base), tmp_path / "adapter", inputs={"x": ROWS})
    torch.testing.assert_close(ours.eval()(ROWS[:1, :3]), theirs.eval()(ROWS[:1, :3]), rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(ROWS), theirs(ROWS))


def test_factors_of_embeddings_that_are_only_read_are_refused_with_the_reason(tmp_path: Path) -> None:
    base = Tables()
    _trained(base, peft.LoraConfig(r=2, target_modules=["inner", "head", "places"]), tmp_path)
    with pytest.raises(PeftfxError, match=r"head \(2 tensors\): the model's code reads its weight") as told:
        px.load(base, tmp_path, inputs={"x": ROWS})
    assert "places (2 tensors): the model runs it, but not as a layer" in str(told.value)


@pytest.mark.parametrize("names", [["head"], ["head", "inner"]])
def test_an_embedding_that_is_the_head_alone_is_saved_as_peft_loads_it(names: list[str], tmp_path: Path) -> None:
    """As `target_parameters`: `peft` ended with an error if `target_modules` named it too."""
    base = Tables()
    with pytest.warns(PeftfxWarning, match="HF PEFT may give other outputs at head"):
        ours = px.transform(copy.deepcopy(base), px.LoRA(r=2, target_modules=names), inputs={"x": ROWS})
    with torch.no_grad():
        for p in ours.adapters.parameters():
            p.normal_(generator=torch.Generator().manual_seed(len(p)))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).merge_and_unload()
    torch.testing.assert_close(ours.eval()(ROWS), theirs.eval()(ROWS), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:HF PEFT may give other outputs:peftfx.errors.PeftfxWarning")
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_layer_with_a_computed_bias_is_adapted_as_peft_merges_it(use_dora: bool, tmp_path: Path) -> None:
    """Unmerged, HF PEFT's layer does nothing there. DoRA must not scale such a bias."""
    torch.manual_seed(0)
    base = ComputedBiases().eval()
    targets = ["qkv", "out", "conv"]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets, use_dora=use_dora))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "adapter")
    merged = theirs.merge_and_unload().eval()
    ours = px.load(copy.deepcopy(base), tmp_path / "adapter", inputs={"ids": CALLS[0]}).eval()
    for ids in CALLS:
        torch.testing.assert_close(ours(ids), merged(ids), rtol=1e-4, atol=1e-4)
    for merge in (True, False):
        ours.export(tmp_path / "out", merge=merge, force=True)
        for ids in CALLS:
            (got,) = ort.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"ids": ids.numpy()})
            np.testing.assert_allclose(got, merged(ids).detach().numpy(), rtol=1e-4, atol=1e-4)
