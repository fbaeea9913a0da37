"""Adapters in half precision: cast by hand or by TRL, which trains those of a quantised base in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import adapt, our_name, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.bases.dtypes import coarsest
from peftfx.model.adapted import AdaptedModel

DORA = peftfx.LoRA(r=3, lora_alpha=7, use_dora=True, init_lora_weights=False, target="attention | mlp")


def cast(model: nn.Module) -> None:
    """As TRL does: the trained tensors, but for DoRA's magnitudes."""
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data = p.data.to(torch.bfloat16)


def kinds(model: AdaptedModel) -> set[torch.dtype]:
    return {p.dtype for p in model.adapters.parameters()}


def steps(model: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(3):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_that_is_all_in_bfloat16_takes_the_steps_of_peft(use_dora: bool, tmp_path: Path) -> None:
    base = ZOO["llama"].build().to(torch.bfloat16)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_dora=use_dora, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path)
    ours = peftfx.load(base, tmp_path)
    ours.adapter("default").to(torch.bfloat16)
    inputs = ZOO["llama"].inputs(model=base, labels=True)
    assert steps(ours, inputs) == steps(theirs, inputs)
    want = {our_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    got = {name.removeprefix("adapters.default."): p for name, p in ours.named_parameters() if p.requires_grad}
    assert got.keys() == want.keys()
    assert all(torch.equal(p, want[name]) for name, p in got.items())


def test_an_adapter_is_cast_by_itself_and_with_its_model() -> None:
    model = adapt("llama", DORA)
    model.add_adapter("second", peftfx.LoRA(r=2, target="all-linear", modules_to_save=["lm_head"]))
    model.adapter("second").to(torch.float64)
    assert {p.dtype for p in model.adapter("second").parameters()} == {torch.float64}
    assert {p.dtype for p in model.adapter("default").parameters()} == {torch.float32}
    model.adapters.to(torch.bfloat16)
    assert kinds(model) == {torch.bfloat16}
    assert coarsest(model.base) == torch.float32
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_graph_that_was_made_before_the_cast_is_made_again() -> None:
    model = adapt("llama", peftfx.LoRA(r=3, target="attention"), road="graph")
    inputs = ZOO["llama"].inputs(model=model.base)
    model(**inputs)
    cast(model)
    assert kinds(model) == {torch.bfloat16}
    got, graph = model(**inputs).logits, model.graph(inputs)
    other = copy.deepcopy(model)
    torch.testing.assert_close(got, other(**inputs).logits, rtol=0, atol=0)  # a copy has no graphs yet
    assert model.graph(inputs) is graph


@pytest.mark.parametrize("view", ["forward", pytest.param("decode", marks=pytest.mark.further)])
def test_over_a_base_in_float32_it_is_exported_in_float32(view: str, tmp_path: Path) -> None:
    model = adapt("llama", DORA).eval()
    cast(model)
    own = [p.data.clone() for p in model.adapters.parameters()]
    model.export(tmp_path / "onnx", merge=False, view=view)
    assert all(torch.equal(p, t) and p.dtype == t.dtype for p, t in zip(model.adapters.parameters(), own, strict=True))
    if view == "decode":
        return
    wide = adapt("llama", DORA).eval()
    for p, t in zip(wide.adapters.parameters(), own, strict=True):
        p.data = t.float()
    inputs = ZOO["llama"].inputs(model=model.base)
    served = peftfx.runtime.load(tmp_path / "onnx")(**inputs).logits
    torch.testing.assert_close(torch.as_tensor(served), wide(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reflections_of_a_convs_patches_are_pefts(dtype: torch.dtype, tmp_path: Path) -> None:
    """The base is in half precision, and the adapter is not."""
    base = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(5, 4, 1, bias=False)).to(dtype)
    config = peft.HRAConfig(r=3, target_modules=["0", "1"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 9, 7).to(dtype)
    plain = base(x)
    ours = peftfx.load(base, tmp_path, inputs={"input": x})
    assert kinds(ours) == {torch.float32}
    got, want = ours(x), theirs.eval()(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, plain, atol=0.05)


MIXED = {
    "vera": (peft.VeraConfig, {"r": 8, "save_projection": True}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 40}),
    "delora": (peft.DeloraConfig, {"r": 4}),
    "frod": (peft.FrodConfig, {}),
    "osf": (peft.OSFConfig, {"effective_rank": 4}),
    "tinylora": (peft.TinyLoraConfig, {}),
    "adamss": (peft.AdamssConfig, {}),
    "mica": (peft.LoraConfig, {"r": 4, "init_lora_weights": "mica"}),
}
ENDS_IN_PEFT = {"vera", "delora", "tinylora", "mica"}  #: in torch's error about two dtypes


@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize("name", MIXED)
def test_constants_beside_cast_tensors_are_multiplied_in_their_dtype(name: str, road: str, tmp_path: Path) -> None:
    """As numbers are; calls ended in torch's error about two dtypes of matrices."""
    config, options = MIXED[name]
    theirs = peft.get_peft_model(ZOO["llama"].build(), config(target_modules=["q_proj", "v_proj"], **options))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = peftfx.load(ZOO["llama"].build(), tmp_path, road=road)
    wide, inputs = copy.deepcopy(model), ZOO["llama"].inputs(model=model.base, labels=True)
    cast(model)
    own = dict(model.adapters.named_parameters())
    for key, p in wide.adapters.named_parameters():
        p.data = own[key].data.float()
    loss, want = (one.train()(**inputs).loss for one in (model, wide))
    torch.testing.assert_close(loss, want, rtol=0, atol=0)
    loss.backward()
    want.backward()
    for key, p in wide.adapters.named_parameters():
        torch.testing.assert_close(own[key].grad, p.grad.to(own[key].dtype), rtol=0, atol=0)
    cast(theirs)
    if name in ENDS_IN_PEFT:
        with pytest.raises(RuntimeError, match="dtype"):
            theirs.train()(**inputs)
    else:
        torch.testing.assert_close(theirs.train()(**inputs).loss, loss, rtol=0, atol=1e-3)


EXACT = {
    "oft": (peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False, "init_weights": False}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4, "init_weights": False}),
    "psoft": (peft.PsoftConfig, {"r": 4}),
}


@pytest.mark.parametrize("name", EXACT)
def test_rotations_in_half_precision_are_solved_for_in_float32(name: str, tmp_path: Path) -> None:
    """As in `peft`: torch has no solver for bfloat16."""
    config, options = EXACT[name]
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(5, 8)
    theirs = peft.get_peft_model(copy.deepcopy(base), config(target_modules=["0"], **options))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = peftfx.load(base, tmp_path, inputs={"input": x})
    for model in (ours, theirs):
        model.to(torch.bfloat16).train()
        model(x.to(torch.bfloat16)).float().square().sum().backward()
    torch.testing.assert_close(ours(x.to(torch.bfloat16)), theirs(x.to(torch.bfloat16)))
    want = [p.grad.norm() for p in theirs.parameters() if p.requires_grad]
    got = [p.grad.norm() for p in ours.parameters() if p.requires_grad]
    torch.testing.assert_close(sorted(got), sorted(want), rtol=0.02, atol=0.0)
