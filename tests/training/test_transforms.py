"""Calls in training under `torch.func`'s transforms, in forward mode and in inference mode, held against HF PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad

import peftfx
from peftfx.contract.common.lora import dora_layer


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """A model with a DoRA in training: HF PEFT's, and the same adapter here."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).double()
    config = peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(base, tmp_path, inputs={"input": _rows()})
    return theirs.double().train(), ours.double().train()


def _rows() -> Tensor:
    return torch.linspace(-1, 1, 24).view(4, 6).double()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def _loss(model: nn.Module, trained: dict[str, Tensor], x: Tensor) -> Tensor:
    return func.functional_call(model, trained, (x,)).square().sum()


def _gradients(model: nn.Module) -> list[Tensor]:
    return list(func.grad(lambda trained: _loss(model, trained, _rows()))(_trained(model)).values())


def _of_each_row(model: nn.Module) -> list[Tensor]:
    of_row = func.grad(lambda trained, x: _loss(model, trained, x))
    return list(func.vmap(of_row, (None, 0))(_trained(model), _rows()[:, None]).values())


def _forward_jacobian(model: nn.Module) -> list[Tensor]:
    return [func.jacfwd(model)(_rows())]


def _tangent(model: nn.Module) -> list[Tensor]:
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(model(forward_ad.make_dual(_rows(), _rows() + 1))).tangent]


def _inferred(model: nn.Module) -> list[Tensor]:
    with torch.inference_mode():
        return [model(_rows())]


@pytest.mark.parametrize(
    "transform",
    [_gradients, _of_each_row, _forward_jacobian, _tangent, _inferred],
    ids=lambda transform: transform.__name__.strip("_"),
)
def test_a_dora_in_training_is_transformed_as_in_peft(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[nn.Module, nn.Module], transform: Callable[[nn.Module], list[Tensor]]
) -> None:
    monkeypatch.setattr(dora_layer, "_LARGE", 1)
    theirs, ours = pair
    expected, found = transform(theirs), transform(ours)
    for left, right in zip(_by_size(found), _by_size(expected), strict=True):
        torch.testing.assert_close(left, right)


def _by_size(tensors: list[Tensor]) -> list[Tensor]:
    """Sort tensors in an order that names have no part in."""
    return sorted(tensors, key=lambda tensor: (tensor.shape, float(tensor.sum())))
