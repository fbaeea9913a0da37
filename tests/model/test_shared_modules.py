"""A module of several names: an adapter acts where HF PEFT puts it, in the graph, in verification, and when merged."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import IA3, LNTuning, LoRA, PeftfxError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.out = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.lin(x)).tanh())


class Twice(nn.Module):
    """One block under two names: its layers are each in one place, which two paths lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Block(), nn.Linear(6, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).tanh())


class Places(nn.Module):
    """Layers that are in two places each: under two names in one module, and twice in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.other, self.after = self.lin, self.norm
        self.layers = nn.ModuleList([layer := nn.Linear(6, 6), layer])

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.other(self.norm(self.lin(x)).tanh()))
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


CONFIGS = {
    "one layer, two paths": (Twice, peft.LoraConfig(r=3, target_modules=["first.lin"])),
    "by the end of a name": (Twice, peft.LoraConfig(r=3, target_modules=["lin", "out"])),
    "input scaled": (Twice, peft.IA3Config(target_modules=["lin", "out"], feedforward_modules=["out"])),
    "norms": (Twice, peft.LNTuningConfig(target_modules=["norm"])),
    "trained whole": (Twice, peft.LoraConfig(r=3, target_modules=["head"], modules_to_save=["lin"])),
    "one of two places": (Places, peft.LoraConfig(r=3, target_modules=["lin"], use_dora=True)),
    "both names given": (Places, peft.LoraConfig(r=3, target_modules=["lin", "other", "layers.0", "layers.1"])),
    "all linear": (Places, peft.LoraConfig(r=3, target_modules="all-linear")),
    "a norm in two places": (Places, peft.LNTuningConfig(target_modules=["norm"])),
    "trained whole, in two places": (Places, peft.LoraConfig(r=3, target_modules=["head"], modules_to_save=["lin"])),
    "with its biases": (Places, peft.LoraConfig(r=3, target_modules=["lin"], bias="all")),
}


@pytest.mark.parametrize(("make", "config"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore:the model also runs")
def test_a_module_of_several_names_is_adapted_where_peft_adapts_it(
    make: type[nn.Module], config: peft.PeftConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, x = make().eval(), torch.randn(5, 6)
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(base, tmp_path / "theirs", inputs={"x": torch.randn(2, 6)}).eval()
    with torch.no_grad():
        want = theirs(x)
        torch.testing.assert_close(ours(x), want)
        assert ours.export(tmp_path / "out").reference.startswith("the model's own code")
        ours.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
        torch.testing.assert_close(again.eval()(x), want)
        ours.merge()
        torch.testing.assert_close(ours.remove()(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [LoRA(r=3, target="all-linear"), LNTuning(), LoRA(target_modules=["lin"])], ids=str)
def test_the_places_that_are_not_adapted_are_told(rule: object) -> None:
    with pytest.warns(UserWarning, match=r"the model also runs (lin as other|norm as after)"):
        peftfx.transform(Places().eval(), rule, inputs={"x": torch.randn(2, 6)})


@pytest.mark.parametrize("rule", [LoRA(target_modules=["other"]), IA3(target_modules=["second.lin"])], ids=str)
def test_a_name_that_is_not_the_first_is_no_name_as_in_peft(rule: LoRA | IA3) -> None:
    base = (Places if isinstance(rule, LoRA) else Twice)().eval()
    with pytest.raises(PeftfxError, match=r"other|second\.lin"):
        peftfx.transform(base, rule, inputs={"x": torch.randn(2, 6)})


def test_a_block_of_two_names_that_is_trained_whole_is_refused() -> None:
    rule = LoRA(r=3, target_modules=["head"], modules_to_save=["first"])
    with pytest.raises(PeftfxError, match=r"(?s)under other names too: second.*first"):
        peftfx.transform(Twice().eval(), rule, inputs={"x": torch.randn(2, 6)})


def test_what_merges_in_place_is_what_it_computed(tmp_path: Path) -> None:
    base, x = Twice().eval(), torch.randn(5, 6)
    plain = copy.deepcopy(base)
    model = peftfx.transform(base, LoRA(r=3, target="all-linear"), inputs={"x": torch.randn(2, 6)}).eval()
    randomise(model)
    with torch.no_grad():
        want = model(x)
        assert (want - plain(x)).abs().max() > 1e-3, "the adapter changes nothing"
        model.merge()
        torch.testing.assert_close(model.remove()(x), want, atol=1e-5, rtol=1e-5)


class OneBias(nn.Module):
    """Two layers that read one bias, and one of them under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out.bias = self.lin.bias
        self.other = self.lin

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.out(self.lin(x).tanh()).tanh())


@pytest.mark.parametrize("targets", [["lin"], ["lin", "out"]])
@pytest.mark.parametrize(
    "options", [{"lora_bias": True}, {"lora_bias": True, "bias": "lora_only"}, {"bias": "lora_only"}]
)
def test_a_bias_that_several_layers_read_changes_where_it_is_adapted(
    targets: list[str], options: dict[str, object], tmp_path: Path
) -> None:
    """A merge wrote the bias of one layer into all, or added both to each; a file with trained ones was refused."""
    base, x = OneBias().eval(), {"x": torch.randn(2, 5, 6)}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets, **options))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    adapted, want = peftfx.load(copy.deepcopy(base), tmp_path, inputs=x).eval(), theirs.eval()(**x)
    torch.testing.assert_close(adapted(**x), want, atol=1e-5, rtol=1e-5)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(**x), want, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted.merge_and_unload()(**x), want, atol=1e-5, rtol=1e-5)


class SecondAlone(Block):
    """A layer under two names, which runs under its second one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.lin

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.last(x)))


def test_a_name_under_which_a_layer_does_not_run_is_told_the_other() -> None:
    """HF PEFT puts a layer under the first name, which nothing runs: the adapter does nothing."""
    x = torch.randn(2, 6)
    theirs = peft.get_peft_model(SecondAlone(), peft.LoraConfig(target_modules=["lin"], init_lora_weights=False))
    with theirs.disable_adapter():
        plain = theirs(x)
    torch.testing.assert_close(theirs(x), plain)
    with pytest.raises(PeftfxError, match="lin: it is one module with last, and the model runs it under that name"):
        peftfx.transform(SecondAlone(), LoRA(target_modules=["lin"]), inputs={"x": x})
    peftfx.transform(SecondAlone(), LoRA(target_modules=["last"]), inputs={"x": x})


def test_a_module_that_only_holds_a_tied_weight_is_told_where_the_weight_is_read() -> None:
    """T5's `shared` does not run. HF PEFT puts a layer there that no call reaches, and says nothing."""
    theirs = peft.get_peft_model(ZOO["t5"].build(), peft.LoraConfig(target_modules=["shared"]))
    inputs, plain = ZOO["t5"].inputs(2, 5), ZOO["t5"].build().eval()
    randomise(theirs)
    torch.testing.assert_close(theirs.eval()(**inputs).logits, plain(**inputs).logits)
    told = pytest.warns(UserWarning, match="reads this weight in encoder.embed_tokens, decoder.embed_tokens, lm_head")
    with told, pytest.raises(PeftfxError, match="matches no site"):
        peftfx.transform(plain, LoRA(target_modules=["shared"]))
