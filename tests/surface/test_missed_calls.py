"""A graph in which an adapter would miss a call of its module is refused. The modules run all calls, as in `peft`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import peftfx
from peftfx.errors import PeftfxError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """One layer, called twice: the second time in a region of autocast."""

    def __init__(self, *, region: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.out, self.region = nn.Linear(8, 8), nn.Linear(8, 4), region

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        if self.region:
            with torch.autocast("cpu", enabled=False):
                h = self.lin(h.float())
        return self.out(h)


def adapter(directory: Path, *, region: bool) -> nn.Module:
    theirs = peft.get_peft_model(Twice(region=region), peft.LoraConfig(r=2, target_modules=["lin"]))
    randomise(theirs)
    theirs.eval().save_pretrained(str(directory))
    return theirs


def test_a_second_call_under_autocast(tmp_path: Path) -> None:
    theirs = adapter(tmp_path / "adapter", region=True)
    ours = peftfx.load(Twice(region=True).eval(), tmp_path / "adapter", inputs={"x": X})
    torch.testing.assert_close(ours(X), theirs(X))
    with pytest.raises(PeftfxError, match="would not act at each call of this module: it runs under torch"):
        peftfx.load(Twice(region=True).eval(), tmp_path / "adapter", inputs={"x": X}, road="graph")(X)


MADE: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "normed": parametrizations.weight_norm,
}


@pytest.mark.parametrize("name", MADE)
def test_a_weight_that_other_code_makes_later(name: str, tmp_path: Path) -> None:
    theirs = adapter(tmp_path / "adapter", region=False)
    MADE[name](theirs.base_model.model.lin.base_layer)
    for road in ("modules", "graph"):
        ours = peftfx.load(Twice(region=False).eval(), tmp_path / "adapter", inputs={"x": X}, road=road)
        MADE[name](ours.base.lin)
        if road == "modules":
            torch.testing.assert_close(ours(X), theirs(X))
        with pytest.raises(PeftfxError, match="would not act at each call of this module"):
            ours(X) if road == "graph" else ours.graph({"x": X})


@pytest.mark.parametrize("name", MADE)
def test_the_weight_of_a_layer_without_a_bias(name: str) -> None:
    """Nothing of the layer itself is read then. The graph had no adapter, without a word."""
    base = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)).eval()
    rule = peftfx.LoRA(r=2, target_modules=["0", "1"], init_lora_weights=False)
    ours = peftfx.transform(base, rule, inputs={"input": X})
    MADE[name](ours.base[0])
    with pytest.raises(PeftfxError, match="would not act at each call of this module"):
        ours.graph({"input": X})
    with pytest.raises(PeftfxError, match="would not act at each call of this module"):
        ours.merge()


def test_a_hook_on_a_layer_gets_what_the_adapted_layer_gives() -> None:
    """As after a merge. `peft` moves the hook to its `base_layer`, and adds the update behind it until it is merged."""
    theirs, ours = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    for base in (theirs, ours):
        base[0].register_forward_hook(lambda layer, given, output: output * 1.5)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    adapted = peftfx.transform(ours, peftfx.LoRA(r=2, target_modules=["0"]), inputs={"input": X})
    peftfx.set_peft_model_state_dict(adapted, peft.get_peft_model_state_dict(model))
    before, merged = model(X), model.merge_and_unload()(X)
    torch.testing.assert_close(adapted(X), merged)
    torch.testing.assert_close(adapted.graph({"input": X}).run(X)[0], merged)
    assert float((before - merged).abs().max()) > 1e-2
