"""LN tuning: copies of norms, however they are written, are `peft`'s; in files, merged and in ONNX Runtime."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.few import but_for
from support.parity import farthest, outputs
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel
from peftfx.model import api
from peftfx.model.adapted import AdaptedModel

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")

#: T5's and Qwen3's RMS norms (Qwen3's on heads too), Gemma's `1 + weight`, BERT's, SegFormer's with a batch norm.
MODELS = ("qwen3", "gemma", "bert", "t5", "segformer")


Bare = Callable[[str], AdaptedModel]


def norms(ours: AdaptedModel) -> list[str]:
    return [site.path for site in ours.sites if site.kind == "norm"]


def tuned(name: str, target: list[str], directory: Path) -> nn.Module:
    """`peft`'s model, every trained copy off its start, and saved."""
    theirs = peft.get_peft_model(ZOO[name].build(), peft.LNTuningConfig(target_modules=target))
    randomise(theirs)
    theirs.save_pretrained(str(directory))
    return theirs.eval()


def call(name: str, base: nn.Module, batch: int, sequence: int) -> dict[str, Tensor]:
    return ZOO[name].inputs(batch, sequence, 5, model=base)


@pytest.mark.parametrize("name", but_for({"t5", "qwen3"}, MODELS))
def test_an_adapter_of_peft_computes_the_same_and_goes_back(name: str, bare: Bare, tmp_path: Path) -> None:
    ours, base = bare(name), ZOO[name].build()
    theirs = tuned(name, norms(ours), tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs", "default")
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    for batch, sequence in ((1, 1), (3, 7)):
        if name == "segformer" and sequence == 1:
            continue  # an image of no patch
        given = call(name, base, batch, sequence)
        want = outputs(theirs, given)
        assert farthest(outputs(ours, given), want, given) <= 1e-5
        assert farthest(outputs(again, given), want, given) <= 1e-5
    ours.remove()


@pytest.mark.parametrize("name", ["gemma", "segformer"])
def test_merged_it_is_the_module_with_the_copies_in_place(name: str, tmp_path: Path) -> None:
    base = ZOO[name].build()
    ours = api.bare(base)
    copied = norms(ours)
    theirs = tuned(name, copied, tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs", "default")
    report = ours.export(tmp_path / "onnx", view="forward")
    given = call(name, base, 2, 5)
    want = outputs(theirs, given)
    served = {key.removesuffix(".output"): value for key, value in OnnxModel(tmp_path / "onnx")(**given).items()}
    assert farthest(served, want, given) <= 1e-4
    assert report.merged == sorted(copied)  # type: ignore[attr-defined]
    assert sorted(ours.merge().sites) == sorted(copied)
    assert farthest(outputs(ours.remove(), given), want, given) <= 1e-6


def test_any_module_is_copied_if_it_is_named_as_in_peft(bare: Bare, tmp_path: Path) -> None:
    ours, theirs = bare("llama"), tuned("llama", ["input_layernorm", "embed_tokens", "up_proj"], tmp_path)
    ours.load_adapter(tmp_path, "default")
    given = call("llama", ours.base, 2, 5)
    assert farthest(outputs(ours, given), outputs(theirs, given), given) <= 1e-5
    assert {p.site.role for p in ours.adapter("default").placements} == {"norm", "embedding.token", "mlp.up"}
    ours.remove()


def test_by_default_it_is_every_norm_and_nothing_else(bare: Bare) -> None:
    adapted = bare("llama")
    adapted.add_adapter("default", "ln_tuning")
    size = sum(adapted.base.get_submodule(path).weight.numel() for path in norms(adapted))  # type: ignore[misc]
    assert adapted.get_nb_trainable_parameters()[0] == size
    adapted.remove()
    assert peftfx.plan(ZOO["llama"].build(), "ln_tuning").parameters == size


def test_layers_are_named_for_peft_which_has_no_option_for_them(bare: Bare, tmp_path: Path) -> None:
    ours = bare("llama")
    ours.add_adapter("default", peftfx.LNTuning(target_modules=["input_layernorm"], layers_to_transform=1))
    ours.save_pretrained(tmp_path)
    ours.remove()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.input_layernorm"]
    assert "layers_to_transform" not in config


def test_a_batch_norm_keeps_its_averages_to_itself() -> None:
    model = ZOO["segformer"].build().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapted = peftfx.transform(model, "ln_tuning")
    adapted(**call("segformer", model, 2, 5))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    own = dict(adapted.adapter("default").named_buffers())["saved.decode_head.batch_norm.running_mean"]
    assert not torch.equal(own, before["decode_head.batch_norm.running_mean"])


class Home(nn.Module):
    """A norm in the code of a module that does other things, with parameters of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.gain, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) - self.first(x).mean(-1, keepdim=True)
        return self.last(y / y.std(-1, keepdim=True) * self.gain + self.shift) * self.gain.sum()


def test_a_norm_that_has_no_module_is_its_parameters(tmp_path: Path) -> None:
    model, x = Home(), torch.randn(3, 6)
    adapted = peftfx.transform(model, "ln_tuning", inputs={"x": x})
    assert {p.site.path for p in adapted.adapter("default").placements} == {"gain", "shift"}
    randomise(adapted)
    want = adapted(x=x)
    adapted.save_pretrained(tmp_path)
    adapted.merge()
    torch.testing.assert_close(adapted.remove()(x), want)
    again = peftfx.load(Home(), tmp_path, inputs={"x": x}).adapter("default")
    assert {name for name, _ in again.named_parameters()} == {"saved.gain.weight", "saved.shift.weight"}


def test_rows_of_a_fused_weight_cannot_be_copied_apart(bare: Bare) -> None:
    with pytest.raises(PeftfxError, match=r"attention\.query is rows of one"):
        bare("gpt2").add_adapter("default", peftfx.LNTuning(target="attention.query"))


def test_lora_beside_it_is_merged_into_the_copy() -> None:
    model = ZOO["llama"].build()
    adapted = peftfx.transform(model, [peftfx.LNTuning(target="norm | mlp.up"), peftfx.LoRA(r=2, target="mlp")])
    randomise(adapted)
    given = call("llama", model, 2, 5)
    want = outputs(adapted, given)
    adapted.merge()
    assert farthest(outputs(adapted.remove(), given), want, given) <= 1e-5


class NormWithParts(nn.LayerNorm):
    """A norm that holds a module of its own, as I-BERT's hold the ranges of what they quantise."""

    def __init__(self) -> None:
        super().__init__(8)
        self.range = nn.Identity()
        self.range.register_buffer("highest", torch.tensor([3.0]))


class OfNormsWithParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = NormWithParts()
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def test_what_a_copied_norm_holds_may_be_in_the_file(tmp_path: Path) -> None:
    base, x = OfNormsWithParts().eval(), torch.randn(2, 8)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["norm"]))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs", inputs={"x": x})
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x))
        torch.testing.assert_close(again(x), theirs(x))
