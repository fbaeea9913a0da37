"""Layers that cast, detach or run under no_grad are sites, with peft's numbers; a rule that names others is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from support.adapted import randomise
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.errors import PeftfxWarning

SIZE = 8


class InDouble(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.weight.double(), self.bias.double()).to(x.dtype)


class InBfloat16(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).float()


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach().clone(), self.bias)


class WithoutGradients(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class ConvInDouble(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()  # peft takes it away where it has magnitudes
        return F.conv1d(x.double(), self.weight.double(), bias).float()


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


class Model(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], *, frozen: bool = False) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(SIZE, SIZE), layer(), nn.Linear(SIZE, 3)
        self.frozen, self.spread = frozen, isinstance(self.layer, nn.Conv1d)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            x = torch.relu(self.before(x))
            x = self.layer(x[..., None])[..., 0] if self.spread else self.layer(x)
        return self.after(torch.relu(x))


LAYERS = {
    "in double": lambda: InDouble(SIZE, SIZE),
    "in bfloat16": lambda: InBfloat16(SIZE, SIZE),
    "detached": lambda: Detached(SIZE, SIZE),
    "without gradients": lambda: WithoutGradients(SIZE, SIZE),
    "a conv in double": lambda: ConvInDouble(SIZE, SIZE, 1),
}
NAMES = ["before", "layer", "after"]


def both(base: nn.Module, config: peft.PeftConfig, directory: Path) -> tuple[nn.Module, nn.Module]:
    """`peft`'s random adapter on a copy of the base, and ours, loaded from what it saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.save_pretrained(str(directory))
    return theirs.eval(), peftfx.load(base, directory, inputs={"x": torch.randn(5, SIZE)})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_layer_that_computes_in_its_own_way_is_adapted_as_peft_does(name: str, dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Model(LAYERS[name]).eval(), torch.randn(3, SIZE)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=NAMES, use_dora=dora)
    theirs, ours = both(base, config, tmp_path)
    near = {"atol": 2e-2, "rtol": 2e-2} if name == "in bfloat16" else {"atol": 1e-5, "rtol": 1e-4}
    want = theirs(x)
    assert (want - base(x)).abs().max() > 1e-2
    torch.testing.assert_close(ours(x=x), want, **near)
    ours.merge()
    torch.testing.assert_close(ours.remove()(x), want, **near)


@pytest.mark.parametrize("name", ["in double", "without gradients"])
def test_ia3_acts_there_too(name: str, tmp_path: Path) -> None:
    base, x = Model(LAYERS[name]).eval(), torch.randn(3, SIZE)
    config = peft.IA3Config(target_modules=["layer", "after"], feedforward_modules=["layer"])
    theirs, ours = both(base, config, tmp_path)
    torch.testing.assert_close(ours(x=x), theirs(x), atol=1e-5, rtol=1e-4)


def test_no_gradient_passes_a_region_without_gradients(tmp_path: Path) -> None:
    base, x = Model(lambda: nn.Linear(SIZE, SIZE), frozen=True), torch.randn(3, SIZE)
    theirs, ours = both(base, peft.LoraConfig(r=2, target_modules=NAMES), tmp_path)
    (got,) = (ours(x=x).sum(),)
    got.backward()
    theirs(x).sum().backward()
    for path in NAMES:
        want = [p.grad for n, p in theirs.named_parameters() if f".{path}.lora" in n]
        have = [p.grad for n, p in ours.adapters.named_parameters() if f".{path}." in n]
        assert [g is None for g in want] == [g is None for g in have]
        for a, b in zip(want, have, strict=True):
            assert a is None or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["in double", "without gradients"])
def test_it_is_exported_merged_and_apart(name: str, tmp_path: Path) -> None:
    base = Model(LAYERS[name]).eval()
    _, ours = both(base, peft.LoraConfig(r=2, target_modules=NAMES), tmp_path / "adapter")
    for merge in (True, False):
        report = ours.export(tmp_path / str(merge), merge=merge, inputs={"x": torch.randn(2, SIZE)})
        assert report.max_abs < 1e-4
        assert not merge or {"before", "layer", "after"} == set(report.merged)


@pytest.mark.parametrize("names", [["layer", "after"], r"layer|after", "all-linear"])
def test_a_rule_that_names_a_layer_that_cannot_be_adapted_is_refused(names: list[str] | str) -> None:
    base = Model(lambda: Masked(SIZE, SIZE)).eval()
    rule = peftfx.LoRA(r=2, target_modules=names)
    with pytest.raises(PeftfxError, match="layer: the model runs it, but not as a layer"):
        peftfx.transform(base, rule, inputs={"x": torch.randn(3, SIZE)})


def test_a_rule_names_an_attention_of_torch_as_in_peft() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.after = nn.MultiheadAttention(SIZE, 2), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.attention(x, x, x)[0])

    base, given = Attends().eval(), {"x": torch.randn(4, 2, SIZE)}
    rule = peft.LoraConfig(r=2, target_modules=["attention", "after"])
    paths = [p.site.path for p in peftfx.transform(base, rule, inputs=given).adapter("default").placements]
    assert paths == ["attention.in_proj_weight", "attention.out_proj", "after"]
    with pytest.warns(UserWarning, match="no call of the model runs attention.out_proj"):
        peftfx.transform(base, peft.LoraConfig(r=2, target_modules=["out_proj", "after"]), inputs=given)


class ReadsBesides(Model):
    """Code that reads a layer's weight, too, or alone."""

    def __init__(self, how: str) -> None:
        super().__init__(lambda: nn.Linear(SIZE, SIZE))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        called = x @ w.mT + self.layer.bias if self.how == "alone" else self.layer(x)
        return self.after(torch.relu(called + w.sum() if self.how == "sum" else called))


def test_a_weight_that_is_read_besides_its_layer_is_not_merged_in_place(tmp_path: Path) -> None:
    base, x = ReadsBesides("sum").eval(), torch.randn(3, SIZE)
    theirs, ours = both(base, peft.LoraConfig(r=2, target_modules=["layer", "after"]), tmp_path / "adapter")
    want = theirs(x)
    with pytest.raises(PeftfxError, match=r"also reads this weight in another way \(sum\).*layer"):
        ours.merge()
    torch.testing.assert_close(ours(x=x), want)
    assert ours.export(tmp_path / "out", merge=True, inputs={"x": torch.randn(2, SIZE)}).max_abs < 1e-5


def test_a_layer_that_hf_peft_would_pass_by_is_told(tmp_path: Path) -> None:
    """Until it is merged, that is."""
    base, x = ReadsBesides("alone").eval(), torch.randn(3, SIZE)
    with pytest.warns(UserWarning, match=r"HF PEFT may give other outputs at layer: .* past its call"):
        theirs, ours = both(base, peft.LoraConfig(r=2, target_modules=["layer"]), tmp_path)
    torch.testing.assert_close(theirs(x), base(x))
    torch.testing.assert_close(ours(x=x), theirs.merge_and_unload()(x))


class Held(Model):
    """Code that runs layers from a plain list (as in MaskFormer), a table, or another attribute."""

    def __init__(self, how: str) -> None:
        super().__init__(lambda: nn.Linear(SIZE, SIZE))
        self.__dict__["held"] = {"list": [self.layer], "table": {"one": self.layer}, "itself": self.layer}[how]

    def forward(self, x: Tensor) -> Tensor:
        held = next(iter(self.held.values()) if isinstance(self.held, dict) else iter([self.held]))
        return self.after(torch.relu((held[0] if isinstance(held, list) else held)(x)))


@pytest.mark.parametrize("how", ["list", "table", "itself"])
def test_a_layer_that_runs_from_elsewhere_than_its_place_is_told(how: str, tmp_path: Path) -> None:
    """`peft` replaces it in its place alone, until it is merged."""
    base, x = Held(how).eval(), torch.randn(3, SIZE)
    with pytest.warns(UserWarning, match=r"HF PEFT may give other outputs at layer: .* outside its tree of modules"):
        theirs, ours = both(base, peft.LoraConfig(r=2, target_modules=["layer"]), tmp_path)
    torch.testing.assert_close(theirs(x), base(x))
    theirs.base_model.model.layer.merge()  # changes the weight of the base's own layer
    torch.testing.assert_close(ours(x=x), theirs(x))


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_that_changes_what_a_layer_gets_or_gives_is_told(before: bool, tmp_path: Path) -> None:
    base, rule = Model(lambda: nn.Linear(SIZE, SIZE)).eval(), peftfx.LoRA(r=2, target_modules=["before", "layer"])
    base.before.register_forward_hook(lambda *_: None)  # it looks on
    if before:
        base.layer.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    else:
        base.layer.register_forward_hook(lambda _, __, given: given * 2)
    with pytest.warns(UserWarning, match=r"HF PEFT may give other outputs at layer: its hooks"):
        ours = peftfx.transform(base, rule, inputs={"x": torch.randn(3, SIZE)}).eval()
    randomise(ours)
    for merge in (True, False):
        assert ours.export(tmp_path / str(merge), merge=merge).max_abs < 1e-5


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.7


class Squashed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x).to(x.dtype))


class ScaledConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return 1.7 * super().forward(x)


MORE: dict[str, Callable[[], nn.Module]] = {
    "after": lambda: Scaled(SIZE, SIZE),
    "before": lambda: Squashed(SIZE, SIZE),
    "conv": lambda: ScaledConv(SIZE, SIZE, 1),
}


@pytest.mark.parametrize("name", MORE)
def test_a_layer_whose_code_computes_more_is_told(name: str, tmp_path: Path) -> None:
    """HF PEFT adds its part to what the layer's code gives, and here it is added to the operation."""
    with pytest.warns(UserWarning, match=r"other outputs at layer: its own code computes more than the operation"):
        both(Model(MORE[name]).eval(), peft.LoraConfig(r=2, target_modules=["layer"]), tmp_path)


class OwnProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class NamedParent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, 1.0 * x)


@pytest.mark.parametrize("layer", [OwnProduct, NamedParent])
def test_a_layer_that_passes_the_forward_of_its_parent_by_runs_in_a_graph(layer: type[nn.Linear]) -> None:
    base, x = nn.Sequential(layer(SIZE, SIZE), nn.Tanh()), torch.randn(3, SIZE)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    ours = peftfx.transform(theirs, inputs={"input": x})
    assert ours.road == "graph"
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_an_embedding_that_hf_peft_scales_as_well_is_not_told(scale: float, tmp_path: Path) -> None:

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "scale_embedding": scale > 1}
    base = hf.BartModel(hf.BartConfig(**sizes, **heads, encoder_ffn_dim=8, decoder_ffn_dim=8)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        ours = peftfx.transform(base, peft.LoraConfig(r=2, target_modules=["encoder.embed_tokens"]))
    assert ours.adapter("default").placements


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.layer = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.attention(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["LoHa", "IA3", "LoRA"])
@torch.no_grad()
def test_the_output_layer_of_torchs_attention_is_told_where_it_acts_here_alone(kind: str, tmp_path: Path) -> None:
    """For LoRA, `peft` has a layer around the attention. It calls other layers only after a merge."""
    configs = {
        "LoHa": peft.LoHaConfig(r=2, target_modules=["out_proj", "layer"]),
        "IA3": peft.IA3Config(target_modules=["out_proj", "layer"], feedforward_modules=[]),
        "LoRA": peft.LoraConfig(r=2, target_modules=["attention", "layer"]),
    }
    theirs = peft.get_peft_model(Attends(), configs[kind]).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 5, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PeftfxWarning)
        ours = peftfx.load(Attends().eval(), tmp_path, inputs={"x": x})
    told = [str(one.message) for one in caught if "attention.out_proj" in str(one.message)]
    live = theirs(x)
    if kind == "LoRA":
        assert not told
        torch.testing.assert_close(ours(x=x), live)
        return
    assert len(told) == 1
    assert "until it is merged" in told[0]
    assert not torch.allclose(ours(x=x), live, atol=1e-3)
    torch.testing.assert_close(ours(x=x), theirs.merge_and_unload()(x), atol=1e-5, rtol=1e-4)
