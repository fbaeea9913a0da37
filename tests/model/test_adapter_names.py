"""An adapter may have any name that `peft` takes and a directory can have; what it is called changes no number."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.adapter_files import same
from torch import Tensor, nn

import peftfx
from peftfx import LoRA, PeftfxError
from peftfx.adapters.adapter import Adapter
from peftfx.contract.kept import OWN_ATTRIBUTES
from peftfx.passes.adaptation.remove import Remove

NAMES = ("a-b", "0", "one two", "déjà", "x=1;y")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def test_names_that_peft_takes_are_kept_in_states_and_directories(tmp_path: Path) -> None:
    ours = peftfx.transform(Two().eval(), LoRA(r=2, target="up | down"), inputs={"x": x()})
    theirs = peft.get_peft_model(Two().eval(), peft.LoraConfig(r=2, target_modules=["up", "down"]))
    for name in NAMES:
        ours.add_adapter(name, LoRA(r=2, target="up | down"))
        theirs.add_adapter(name, peft.LoraConfig(r=2, target_modules=["up", "down"]))
    randomise(ours.adapters)
    ours.save_pretrained(tmp_path)
    state = ours.state_dict()
    again = peftfx.transform(Two().eval(), LoRA(r=2, target="up | down"), inputs={"x": x()})
    for name in NAMES:
        assert f"adapters.{name}.up.lora_A" in state
        theirs.load_adapter(str(tmp_path / name), f"{name} loaded")
        theirs.set_adapter(f"{name} loaded")
        ours.set_adapter(name)
        same(ours(x=x(4)), theirs(x(4)))
        again.load_adapter(tmp_path / name, name)
        same(again(x=x(4)), theirs(x(4)))
    ours.set_adapter(["a-b", "one two"])
    assert Remove()(ours.graph()).graph.text() == ours.graph(adapted=False).text()
    again.load_state_dict(state)


@torch.no_grad()
def test_an_adapter_of_such_a_name_is_exported_and_merged(tmp_path: Path) -> None:
    ours = peftfx.transform(Two().eval(), LoRA(r=2, target="up | down"), "one two", inputs={"x": x()})
    randomise(ours.adapters)
    want = ours(x=x(5))
    for merge in (True, False):
        ours.export(tmp_path / str(merge), merge=merge)
        (got,) = peftfx.runtime.load(tmp_path / str(merge))(x=x(5)).values()
        same(torch.as_tensor(got), want)
    ours.merge()
    same(ours.remove()(x(5)), want)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a\\b", " a", "a\n", "state_dict", "class", "x" * 300])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(PeftfxError, match="adapter_name"):
        peftfx.transform(Two(), LoRA(r=2, target="up"), name, inputs={"x": x()})


def test_an_adapter_is_not_saved_over_a_rule_of_another(tmp_path: Path) -> None:
    ours = peftfx.transform(Two(), "lora(r=2)@up; ia3@down", inputs={"x": x()})
    ours.add_adapter("2-ia3", "lora(r=2)@up")
    with pytest.raises(PeftfxError, match="this one folder"):
        ours.save_pretrained(tmp_path)


class Named(Two):
    """A model whose own modules are called as attributes of an adapter are."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.start = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shared(self.start(x)))


def test_an_adapters_own_attributes_are_known() -> None:
    public = {name for name in dir(Adapter(())) if not name.startswith("_")}
    assert public - set(dir(nn.Module())) == OWN_ATTRIBUTES


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_modules_of_the_base_may_be_called_as_an_adapters_attributes(road: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["shared", "0", "up"])
    theirs = peft.get_peft_model(Named().eval(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(Named(), tmp_path / "theirs", inputs={"x": x()}, road=road).eval()
    same(ours(x(5)), theirs(x(5)))
    for model in (ours, theirs):
        model(x()).square().sum().backward()
    gradients = [sorted(float(p.grad.norm()) for p in m.parameters() if p.grad is not None) for m in (ours, theirs)]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(Named(), str(tmp_path / "ours")).eval()(x(5)), theirs(x(5)))
    ours.load_state_dict(ours.state_dict())
    same(ours.merge_and_unload()(x(5)), theirs(x(5)))
