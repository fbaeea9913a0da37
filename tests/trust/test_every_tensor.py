"""Every tensor of an adapter's file is taken, or the file is refused by module and reason, or it is told to be idle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.adapted import randomise
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

import peftfx
from peftfx import PeftfxError
from peftfx.analysis.unreached import is_unreached
from peftfx.export.verification.comparison import VerificationError

SIZE = 8


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Split(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, half) for half in self.weight.chunk(2)], -1) + self.bias


class Einsum(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self.weight) + self.bias


class Autocast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def weight_norm(size: int, out: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(size, out))


def spectral_norm(size: int, out: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(size, out))


def masked_by_hooks(size: int, out: int) -> nn.Module:
    with torch.no_grad():  # a weight with a history cannot be copied
        return prune.l1_unstructured(nn.Linear(size, out), "weight", 0.5)


def normed_by_hooks(size: int, out: int) -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(size, out))


class Two(nn.Module):
    """A layer of some class, and a plain one behind it."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = layer(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Branches(nn.Module):
    """A layer that runs in training alone, and one that no code names but the constructor's."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.sometimes(x) if self.training or twice else x
        return self.always(x)


class Attends(nn.Module):
    """torch's own attention, of a sequence to itself or to the first token alone, and a layer."""

    def __init__(self, *, crossed: bool = False) -> None:
        super().__init__()
        self.attention, self.after = nn.MultiheadAttention(SIZE, 2, batch_first=True), nn.Linear(SIZE, SIZE)
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 if self.crossed else x
        return self.after(self.attention(x, y, y, need_weights=False)[0])


def saved(base: nn.Module, directory: Path, *modules: str, **options: object) -> nn.Module:
    """`peft`'s random LoRA on these modules of a copy of the base, in eval mode; it is saved to the directory."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(modules), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.save_pretrained(str(directory))
    return theirs.eval()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Masked, "its weight is read by"),
        (Standardised, "its weight is read by mean"),
        (Split, "its weight is read by chunk"),
        (Einsum, "its weight is read by einsum"),
        (Autocast, "it runs under torch.autocast"),
        (weight_norm, "a weight that is computed from others: .*remove_parametrizations"),
        (spectral_norm, "a weight that is computed from others"),
        (masked_by_hooks, "a weight that is computed from others: .*prune.remove"),
        (normed_by_hooks, "a weight that is computed from others: .*remove_spectral_norm"),
    ],
)
def test_a_layer_that_runs_in_a_way_of_its_own_is_refused_by_name(
    layer: Callable[[int, int], nn.Module], reason: str, tmp_path: Path
) -> None:
    base = Two(layer).eval()
    saved(base, tmp_path, "first", "second")
    with pytest.raises(PeftfxError, match=rf"(?s)first \(2 tensors\): .*{reason}"):
        peftfx.load(base, tmp_path, inputs={"x": torch.randn(3, SIZE)})


def test_a_layer_that_the_example_call_does_not_run_is_refused_and_inputs_that_run_it_help(tmp_path: Path) -> None:
    base, x = Branches().eval(), torch.randn(3, SIZE)
    theirs = saved(base, tmp_path, "always", "sometimes")
    with pytest.raises(
        PeftfxError, match=r"sometimes \(2 tensors\): this call does not run it: in Python, pass inputs="
    ):
        peftfx.load(base, tmp_path, inputs={"x": x})
    ours = peftfx.load(base, tmp_path, inputs={"x": x, "twice": True})
    torch.testing.assert_close(ours(x=x, twice=True), theirs(x=x, twice=True))
    torch.testing.assert_close(ours(x=x), theirs(x=x))
    torch.testing.assert_close(ours.train()(x=x), theirs.train()(x=x))


class Mlps(nn.Module):
    """One MLP, or another, by an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.ModuleList([nn.Linear(SIZE, SIZE) for _ in range(2)]) for _ in range(3))

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        up, down = self.two if other else self.one
        return self.head[0](x + down(torch.relu(up(x))))


@pytest.mark.parametrize("method", [peftfx.LoRA(r=2, target="mlp"), peftfx.IA3(target="mlp.down")], ids=str)
def test_a_call_that_runs_other_layers_that_a_rule_picks_is_refused_by_name(method: object, tmp_path: Path) -> None:
    base, x = Mlps().eval(), torch.randn(3, SIZE)
    model = peftfx.transform(base, method, inputs={"x": x})
    model(x=x)
    with pytest.raises(PeftfxError, match=r"(?s)that a rule picks.*two\..*inputs="):
        model(x=x, other=True)
    with pytest.raises(PeftfxError, match=r"that a rule picks"):
        model.export(tmp_path / "out", inputs={"x": x, "other": True})
    with model.disable_adapter():
        torch.testing.assert_close(model(x=x, other=True), base(x, other=True))
    model.remove()
    both = peftfx.transform(base, peftfx.LoRA(r=2, target="head"), inputs={"x": x})
    both(x=x, other=True)  # the rule picks nothing of the other branch


def test_cross_attention_that_the_example_call_does_not_run_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    base = GPT2LMHeadModel(config).eval()
    theirs = saved(base, tmp_path, "c_attn", "q_attn", fan_in_fan_out=True)
    with pytest.raises(PeftfxError, match=r"crossattention.q_attn .*this call does not run it"):
        peftfx.load(base, tmp_path)
    given = {"input_ids": torch.randint(32, (2, 5)), "encoder_hidden_states": torch.randn(2, 3, 16)}
    ours = peftfx.load(base, tmp_path, inputs=given)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("idle", ["never", "shared"])
def test_what_no_call_can_run_is_told_and_saved_again(idle: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    base = Branches() if idle == "never" else T5ForConditionalGeneration(T5Config(**sizes))
    given = {"inputs": {"x": torch.randn(3, SIZE)}} if idle == "never" else {}
    saved(base.eval(), tmp_path / "theirs", idle, "always" if idle == "never" else "q")
    with pytest.warns(UserWarning, match=rf"no call of the model runs the modules of {idle}\."):
        ours = peftfx.load(base, tmp_path / "theirs", **given)
    ours.save_pretrained(tmp_path / "ours")
    want, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    with pytest.warns(UserWarning, match=rf"the sum leaves out tensors of 'default' .*{idle}\."):
        ours.add_weighted_adapter(["default"], [0.5], "scaled")


def test_the_attention_of_torch_is_adapted_at_both_projections_as_peft_does_it(tmp_path: Path) -> None:
    """`peft` adds the update of the output projection twice, in each call and when it merges."""
    base, x = Attends().eval(), torch.randn(2, 5, SIZE)
    theirs = saved(base, tmp_path / "theirs", "attention", "after")
    want = theirs(x)
    ours = peftfx.load(base, tmp_path / "theirs", inputs={"x": torch.randn(3, 4, SIZE)})
    torch.testing.assert_close(ours(x=x), want)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(x), want)
    ours.merge()
    torch.testing.assert_close(ours.remove()(x), want)


@pytest.mark.parametrize("role", ["attention.qkv", "attention.output"])
def test_one_projection_of_an_attention_of_torch_is_saved_as_peft_reads_it(role: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Attends().eval(), torch.randn(2, 5, SIZE)
    ours = peftfx.transform(base, peftfx.LoRA(r=2, target=role), inputs={"x": x})
    for p in ours.adapters.parameters():
        nn.init.normal_(p)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), ours(x=x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peftfx.load(base, tmp_path, inputs={"x": x})(x=x), ours(x=x))


def test_an_attention_of_torch_whose_weight_is_cut_is_refused(tmp_path: Path) -> None:
    base = Attends(crossed=True).eval()
    saved(base, tmp_path, "attention", "after")
    with pytest.raises(PeftfxError, match=r"attention .*its in_proj_weight is read by"):
        peftfx.load(base, tmp_path, inputs={"x": torch.randn(2, 5, SIZE)})


def test_the_output_layer_of_an_attention_of_torch_alone_does_nothing_as_in_peft(tmp_path: Path) -> None:
    base, x = Attends().eval(), torch.randn(2, 5, SIZE)
    theirs = saved(base, tmp_path, "out_proj", "after")
    with pytest.warns(UserWarning, match="attention.out_proj"):
        ours = peftfx.load(base, tmp_path, inputs={"x": x})
    torch.testing.assert_close(ours(x=x), theirs(x))


@pytest.mark.slow
def test_the_pooling_head_of_siglip_is_refused_by_name_or_told_to_be_idle(tmp_path: Path) -> None:
    """A probe attends there: torch cuts the weight of its three projections in two."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = SiglipVisionModel(SiglipVisionConfig(**size, image_size=8, patch_size=4)).eval()
    inputs = torch.randn(2, 3, 8, 8)
    saved(base, tmp_path / "whole", "attention", "fc1")
    with pytest.raises(PeftfxError, match=r"head\.attention \(2 tensors\): .*its in_proj_weight is read by"):
        peftfx.load(base, tmp_path / "whole", inputs={"pixel_values": inputs})
    theirs = saved(base, tmp_path / "out", "out_proj")
    with pytest.warns(UserWarning, match=r"no call .* runs the modules of head\.attention\.out_proj"):
        ours = peftfx.load(base, tmp_path / "out", inputs={"pixel_values": inputs})
    want = theirs(pixel_values=inputs).pooler_output
    assert (want - base(pixel_values=inputs).pooler_output).abs().max() > 1e-2
    torch.testing.assert_close(ours(pixel_values=inputs).pooler_output, want)


class Pooling(nn.Module):
    """A model that always pools, and returns what is pooled where it is asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, pooled: bool = False) -> Tensor:
        hidden = self.body(x)
        found = self.pooler(hidden).tanh()
        return found if pooled else hidden


def test_what_a_call_runs_and_uses_nothing_of_acts_where_another_call_uses_it(tmp_path: Path) -> None:
    base, x = Pooling().eval(), torch.randn(3, SIZE)
    theirs = saved(base, tmp_path / "theirs", "body", "pooler")
    ours = peftfx.load(base, tmp_path / "theirs", inputs={"x": x})
    assert ours.road == "modules"
    for pooled in (False, True):
        torch.testing.assert_close(ours(x=x, pooled=pooled), theirs(x=x, pooled=pooled))
    report = ours.export(tmp_path / "out")
    assert report.tensors["not run here"] == 2
    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path)
    want = theirs.merge_and_unload()(x=x, pooled=True)
    torch.testing.assert_close(ours.merge_and_unload()(x=x, pooled=True), want)


def test_what_a_graph_runs_and_uses_nothing_of_is_told_and_saved_again(tmp_path: Path) -> None:
    base, x = Pooling().eval(), torch.randn(3, SIZE)
    theirs = saved(base, tmp_path / "theirs", "body", "pooler")
    with pytest.warns(UserWarning, match=r"this call uses nothing of the modules of .*pooler"):
        ours = peftfx.load(base, tmp_path / "theirs", inputs={"x": x}, road="graph")
    torch.testing.assert_close(ours(x=x), theirs(x=x))
    ours.export(tmp_path / "out")
    ours.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path)
    with pytest.raises(PeftfxError, match=r"this call uses the outputs of 1 module.*pooler"):
        ours(x=x, pooled=True)


def assert_same_files(folder: Path) -> None:
    want, got = (load_file(folder / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_tensors_left_out_of_a_module_whose_output_counts_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, x = Pooling().eval(), torch.randn(3, SIZE)
    saved(base, tmp_path / "theirs", "body", "pooler")
    with pytest.warns(UserWarning, match="uses nothing"):
        ours = peftfx.load(base, tmp_path / "theirs", inputs={"x": x}, road="graph")
    monkeypatch.setattr(Pooling, "forward", lambda self, x: (h := self.body(x)) + self.pooler(h))
    with pytest.raises(VerificationError, match=r"modules that run, but the reference adapts none of them.*pooler"):
        ours.export(tmp_path / "out")


def test_a_module_that_code_reaches_by_the_text_of_an_attribute_may_run() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    assert not is_unreached(model, "model.layers.0.mlp.up_proj")
