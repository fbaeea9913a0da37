"""Two adapters at one site give what `peft` gives with both active: in forward, merged, and in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.adapter_files import same
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import BOFT, IA3, LoRA
from peftfx.graph.graph import ADAPTERS
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.adaptation.remove import Remove

NAMES = ("one", "two")
CONFIGS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], lora_dropout=0.1),
    "biased": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], lora_bias=True),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
    "deft": lambda: peft.DeftConfig(r=2, target_modules=["up", "down"]),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=["up", "down"]),
}


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))


def both(kinds: tuple[str, str], directory: Path) -> tuple[AdaptedModel, nn.Module]:
    """Two random adapters of these kinds, on one base, in `peft` and here; both active."""
    theirs = peft.get_peft_model(Feed(), CONFIGS[kinds[0]](), adapter_name="one")
    theirs.add_adapter("two", CONFIGS[kinds[1]]())
    theirs.base_model.set_adapter(list(NAMES))
    randomise(theirs)
    theirs.eval().save_pretrained(directory)
    ours = peftfx.load(Feed().eval(), directory / "one", "one", inputs={"x": x()})
    ours.load_adapter(directory / "two", "two")
    ours.set_adapter(NAMES)
    return ours, theirs


PAIRS = [("lora", "dora"), ("dora", "lora"), ("dora", "dora"), ("biased", "dora"), ("ia3", "ia3"), ("deft", "deft")]


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
@torch.no_grad()
def test_both_act_as_in_peft(kinds: tuple[str, str], tmp_path: Path) -> None:
    ours, theirs = both(kinds, tmp_path)
    want = theirs(x(5))
    same(ours(x=x(5)), want)
    ours.set_adapter("one")
    assert not torch.allclose(ours(x=x(5)), want, atol=1e-3)
    ours.set_adapter(NAMES)
    ours.merge()
    same(ours.remove()(x(5)), want)


@pytest.mark.parametrize("kinds", [("lora", "dora"), ("ia3", "ia3"), ("hra", "hra")], ids=str)
@torch.no_grad()
def test_both_are_exported_as_in_peft(kinds: tuple[str, str], tmp_path: Path) -> None:
    ours, theirs = both(kinds, tmp_path)
    ours.export(tmp_path / "out")
    (got,) = peftfx.runtime.load(tmp_path / "out")(x=x(7)).values()
    same(torch.as_tensor(got), theirs(x(7)))


@torch.no_grad()
def test_a_lora_under_a_scaled_input_is_scaled_with_it() -> None:
    """`peft` has no such pair in one model. Merged and unmerged are one, and in training gradients reach both."""
    ours = peftfx.transform(Feed(), LoRA(r=2, target="down"), "one", inputs={"x": x()})
    ours.add_adapter("two", IA3(target="down", feedforward_modules=["down"]))
    ours.set_adapter(NAMES)
    randomise(ours.adapters)
    base = copy.deepcopy(ours.base)
    lora, scale = ours.adapter("one").get("down.lora_A"), ours.adapter("two").get("down.ia3_l").flatten()
    weight = (base.down.weight + 4 * ours.adapter("one").get("down.lora_B") @ lora) * scale
    want = torch.relu(base.up(x(4))) @ weight.T
    same(ours(x=x(4)), want)
    with torch.enable_grad():
        ours.train()(x=x(4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.adapters.parameters())
    ours.eval().merge()
    same(ours.remove()(x(4)), want)


@torch.no_grad()
def test_what_an_adapter_adds_to_a_bias_is_scaled_by_the_next_one_when_merged_too() -> None:
    ours = peftfx.transform(Feed().eval(), LoRA(r=2, target="up", lora_bias=True), "one", inputs={"x": x()})
    ours.add_adapter("two", BOFT(boft_block_size=3, target="up"))
    ours.set_adapter(NAMES)
    randomise(ours.eval().adapters)
    want = ours(x=x(4))
    ours.merge()
    same(ours.remove()(x(4)), want)


@torch.no_grad()
def test_what_is_no_part_of_a_weight_acts_last_on_both_roads() -> None:
    ours = peftfx.transform(ZOO["llama"].build(), LoRA(target="attention.query", alora_invocation_tokens=[5, 7]), "one")
    ours.add_adapter("two", IA3(target="attention.query", feedforward_modules=()))
    ours.set_adapter(NAMES)
    randomise(ours.eval().adapters)
    given = ZOO["llama"].inputs(model=ours.base)
    given["input_ids"][:, 2:4] = torch.tensor([5, 7])
    found = []
    for ours.wanted in ("modules", "graph"):
        found.append(ours(**given).logits)
    same(*found)


def test_removing_the_first_leaves_the_graph_of_the_second_alone() -> None:
    rule = IA3(target="up | down", feedforward_modules=["down"])
    ours = peftfx.transform(Feed().eval(), rule, "one", inputs={"x": x()})
    ours.add_adapter("two", rule)
    linked = ours.graph(adapted=False).clone()
    linked.module.add_module(ADAPTERS, ours.adapters)
    one, two = (Insert(name, ours.adapter(name)) for name in NAMES)
    left = Remove("one")(two(one(linked).graph).graph).graph
    assert left.text() == two(linked).graph.text()


@torch.no_grad()
def test_two_loras_at_a_grouped_conv_are_one_dense_conv_when_merged() -> None:
    image = torch.randn(2, 8, 5, 5)
    conv = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)).eval()
    conv.forward = conv[0].forward  # type: ignore[method-assign]
    ours = peftfx.transform(conv, LoRA(r=2, target="/.*/"), "one", inputs={"input": image})
    ours.add_adapter("two", LoRA(r=4, target="/.*/"))
    ours.set_adapter(NAMES)
    randomise(ours.adapters)
    want = ours(input=image)
    ours.merge()
    same(ours.remove()(image), want)
