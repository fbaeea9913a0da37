"""A module that is called under two names is merged under the name that is adapted alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapted import randomise
from torch import Tensor, nn

import peftfx
from peftfx import IA3, LoRA


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lin(x).tanh())


class Twice(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Block(), nn.Linear(6, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).tanh())


RULES = {
    "one name": LoRA(r=3, target_modules=["first.lin"]),
    "the other name": LoRA(r=3, target_modules=["second.lin"]),
    "both, each its own": LoRA(r=3, target_modules=["first.lin", "second.lin"]),
    "input scaled": IA3(target_modules=["second.out"], feedforward_modules=["second.out"]),
    "trained whole": LoRA(r=3, target_modules=["head"], modules_to_save=["first.lin"]),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_module_of_two_names_merges_to_what_it_computed(rule: object) -> None:
    torch.manual_seed(0)
    base, x = Twice().eval(), torch.randn(5, 6)
    plain = copy.deepcopy(base)
    model = peftfx.transform(base, rule, inputs={"x": torch.randn(2, 6)}).eval()
    randomise(model)
    with torch.no_grad():
        want = model(x)
        assert (want - plain(x)).abs().max() > 1e-3, "the adapter changes nothing"
        model.merge()
        torch.testing.assert_close(model.remove()(x), want, atol=1e-5, rtol=1e-5)
