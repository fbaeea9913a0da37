"""Weighted sums of adapters are `peft`'s, and where `peft` is wrong, right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import CONVS, Convs, randomise
from support.adapter_files import first, load_peft, same
from support.zoo import ZOO

import peftfx
from peftfx import IA3, LoRA, PeftfxError
from peftfx.model.adapted import AdaptedModel

NAMES = ("one", "two", "three")
Options = dict[str, object]


def both(name: str, directory: Path, configs: Sequence[peft.PeftConfig]) -> tuple[AdaptedModel, peft.PeftModel]:
    """One base with these adapters, at random values, twice: ours, loaded from what `peft` saved, and `peft`'s own."""
    theirs = peft.get_peft_model(ZOO[name].build(), configs[0], adapter_name=NAMES[0])
    for adapter, config in zip(NAMES[1:], configs[1:], strict=False):
        theirs.add_adapter(adapter, config)
    for adapter in NAMES[: len(configs)]:
        theirs.set_adapter(adapter)
        randomise(theirs)
    theirs.eval().save_pretrained(str(directory))
    ours = peftfx.load(ZOO[name].build(), directory / NAMES[0], NAMES[0])
    for adapter in NAMES[1 : len(configs)]:
        ours.load_adapter(directory / adapter, adapter)
    return ours, theirs


def lora(target: Sequence[str], **options: object) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=list(target), **{"r": 4, "lora_alpha": 6, **options})


LORAS = {
    "linear-bert": ("bert", [lora(["query", "value"]), lora(["value", "output.dense"], lora_alpha=3)], "linear"),
    "cat-gpt2": ("gpt2", [lora(["c_attn", "wte"]), lora(["c_attn", "c_fc"], r=3), lora(["wte"], r=2)], "cat"),
    "cat-convnext": ("convnext", [lora(["pwconv1", "downsampling_layer.1"]), lora(["downsampling_layer.1"])], "cat"),
    "linear-convnext": ("convnext", [lora(["downsampling_layer.1"]), lora(["downsampling_layer.1"])], "linear"),
}


@pytest.mark.parametrize(("name", "configs", "how"), LORAS.values(), ids=LORAS)
def test_a_weighted_lora_is_pefts_and_crosses_to_it(
    name: str, configs: Sequence[peft.PeftConfig], how: str, tmp_path: Path
) -> None:
    ours, theirs = both(name, tmp_path / "apart", configs)
    names, weights = list(NAMES[: len(configs)]), [0.7, -0.4, 1.5][: len(configs)]
    inputs = ZOO[name].inputs(3, 5, 4, model=ours.base)
    theirs.add_weighted_adapter(names, weights, "sum", combination_type=how)
    theirs.set_adapter("sum")
    want = first(theirs, inputs)
    ours.add_weighted_adapter(names, weights, "sum", how)
    assert ours.active == ("sum",)
    same(first(ours, inputs), want)
    assert not torch.allclose(want, first(ours.base, inputs), atol=1e-3)

    ours.save_pretrained(tmp_path / "sum", "sum")
    same(first(load_peft(ZOO[name].build(), tmp_path / "sum"), inputs), want)
    same(first(peftfx.load(ZOO[name].build(), tmp_path / "sum"), inputs), want)


def test_a_weighted_ia3_is_pefts_and_crosses_to_it(tmp_path: Path) -> None:
    options: list[Options] = [
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ]
    ours, theirs = both("llama", tmp_path / "apart", [peft.IA3Config(**o) for o in options])
    inputs = ZOO["llama"].inputs(3, 5, 4, model=ours.base)
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum")
    theirs.set_adapter("sum")
    ours.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum")
    same(first(ours, inputs), first(theirs, inputs))
    ours.save_pretrained(tmp_path / "sum", "sum")
    same(first(load_peft(ZOO["llama"].build(), tmp_path / "sum"), inputs), first(ours, inputs))


def test_a_sum_of_loras_without_a_type_is_pefts(tmp_path: Path) -> None:
    """`peft` sums the effects, and cuts them to the largest rank; the sum of the factors is something else."""
    configs = [peft.LoraConfig(r=r, lora_alpha=5, target_modules=["q_proj", "up_proj"]) for r in (2, 4)]
    ours, theirs = both("llama", tmp_path / "apart", configs)
    inputs = ZOO["llama"].inputs(3, 5, 4, model=ours.base)
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum")
    theirs.set_adapter("sum")
    ours.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum")
    same(first(ours, inputs), first(theirs, inputs))


@pytest.fixture(scope="module")
def gpt2() -> AdaptedModel:
    return peftfx.transform(ZOO["gpt2"].build(), LoRA(target="mlp"), "unused")


@pytest.fixture
def model(gpt2: AdaptedModel) -> AdaptedModel:
    """Captured once; adapters come and go."""
    for name in gpt2.names():
        gpt2.remove(name)
    return gpt2


def add(model: AdaptedModel, **rules: object) -> None:
    for name, rule in rules.items():
        model.add_adapter(name, rule)
        randomise(model)


def test_cat_sums_effects_whatever_the_adapters_are(model: AdaptedModel) -> None:
    """Of parts and of a whole; with other scales (peft takes the root of the rank for rsLoRA's); from PiSSA's start."""
    add(model, parts=LoRA(r=3, use_rslora=True), whole=LoRA(r=2, target="attention", lora_alpha=5))
    add(model, pissa=LoRA(r=2, target="mlp.up", init_lora_weights="pissa"), bias=LoRA(target="mlp.up", lora_bias=True))
    inputs = ZOO["gpt2"].inputs(2, 6, 1, model=model.base)
    model.set_adapter(names := model.names())
    want = first(model, inputs)
    model.add_weighted_adapter(names, [1.0] * 4, "sum", "cat")
    same(first(model, inputs), want)
    deltas = copy.deepcopy(model)
    deltas.merge()
    same(first(deltas.base, inputs), want)


@pytest.mark.parametrize("order", [NAMES[:2], NAMES[1::-1]])
def test_a_sum_of_which_some_have_biases_of_b_is_saved(order: Sequence[str], tmp_path: Path) -> None:
    """A file tells once for all layers whether B has a bias; `peft` itself leaves these biases out of its sum."""
    biased = lora(["q_proj"], lora_bias=True, r=2)
    ours, _ = both("llama", tmp_path / "apart", [biased, lora(["q_proj", "down_proj"])])
    inputs = ZOO["llama"].inputs(3, 5, 4, model=ours.base)
    ours.set_adapter(order)
    want = first(ours, inputs)
    ours.add_weighted_adapter(order, [1.0, 1.0], "sum", "cat")
    same(first(ours, inputs), want)
    ours.save_pretrained(tmp_path / "sum", "sum")
    same(first(peftfx.load(ZOO["llama"].build(), tmp_path / "sum"), inputs), want)
    same(first(load_peft(ZOO["llama"].build(), tmp_path / "sum"), inputs), want)


def test_a_sum_with_biases_of_b_and_an_embedding_is_saved_as_two_rules(tmp_path: Path) -> None:
    ours, _ = both("llama", tmp_path / "apart", [lora(["embed_tokens"]), lora(["q_proj"], lora_bias=True)])
    inputs = ZOO["llama"].inputs(3, 5, 4, model=ours.base)
    ours.add_weighted_adapter(NAMES[:2], [0.5, -2.0], "sum", "cat")
    ours.save_pretrained(tmp_path / "sum", "sum")
    same(first(peftfx.load(ZOO["llama"].build(), tmp_path / "sum"), inputs), first(ours, inputs))


def test_cat_keeps_the_groups_of_a_convolution_apart() -> None:
    x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))
    model = peftfx.transform(Convs(), LoRA(r=4, target_modules=CONVS), "one", inputs={"x": x})
    add(model, two=LoRA(r=8, target_modules=["grouped"]))
    model.set_adapter(["one", "two"])
    want = model(x)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    same(model(x), want)


def test_a_head_that_one_of_them_trained_is_kept(model: AdaptedModel, tmp_path: Path) -> None:
    add(
        model, head=LoRA(modules_to_save=["lm_head"]), plain=LoRA(target="mlp"), again=LoRA(modules_to_save=["lm_head"])
    )
    model.add_weighted_adapter(["plain", "head"], [0.5, 2.0], "sum")
    assert torch.equal(
        model.adapter("sum").get("saved.lm_head.weight"), model.adapter("head").get("saved.lm_head.weight")
    )
    inputs = ZOO["gpt2"].inputs(2, 6, 1, model=model.base)
    model.save_pretrained(tmp_path, "sum")
    same(first(peftfx.load(ZOO["gpt2"].build(), tmp_path), inputs), first(model, inputs))
    with pytest.raises(PeftfxError, match="'head' and 'again' both train"):
        model.add_weighted_adapter(["head", "again"], [1, 1], "more")


@pytest.mark.parametrize(("name", "target"), [("gpt2", "c_attn"), ("mistral", "v_proj")], ids=["tied", "untied"])
def test_rows_of_tokens_that_one_of_them_trained_are_kept(name: str, target: str, tmp_path: Path) -> None:
    ours = peftfx.transform(ZOO[name].build(), LoRA(target=f"/.*{target}/"), adapter_name="one").eval()
    theirs = peft.get_peft_model(ZOO[name].build(), lora([target], trainable_token_indices=[3, 5]))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "two"), save_embedding_layers=False)
    ours.load_adapter(tmp_path / "two", "two")
    ours.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum")
    inputs = ZOO[name].inputs(2, 6, 1, model=ours.base)
    inputs["input_ids"][:, :2] = torch.tensor([3, 5])
    ours.save_pretrained(tmp_path / "sum", selected_adapters=["sum"])
    want = first(ours, inputs)
    same(first(peftfx.load(ZOO[name].build(), tmp_path / "sum" / "sum").eval(), inputs), want)
    same(first(load_peft(ZOO[name].build(), tmp_path / "sum" / "sum"), inputs), want)
    ours.load_adapter(tmp_path / "two", "again")
    with pytest.raises(PeftfxError, match="'two' and 'again' both train"):
        ours.add_weighted_adapter(["two", "again"], [1, 1], "more")


def test_what_has_no_sum_is_refused(model: AdaptedModel) -> None:
    add(model, a=LoRA(r=2), b=LoRA(r=3), dora=LoRA(r=2, use_dora=True), scale=IA3(), biased=LoRA(r=2, bias="all"))
    add(model, prompt=peftfx.PromptTuning(num_virtual_tokens=2), pissa=LoRA(r=2, init_lora_weights="pissa"))
    before = model.active
    for names, how, message in (
        (["a", "b"], "linear", "equal ranks, not 2, 3"),
        (["a", "dora"], "cat", "DoRA adapters cannot be summed"),
        (["a", "scale"], "linear", "IA3 and LoRA cannot be summed"),
        (["scale"], "cat", "IA3 has no combination 'cat'"),
        (["a", "biased"], "linear", "biases cannot be summed"),
        (["a", "prompt"], "linear", "PromptTuning has no sum"),
        (["a", "pissa"], "linear", "start from the weight"),
        (["a", "c"], "linear", "no adapter named 'c'"),
        (["a"], "lineal", "did you mean 'linear'"),
    ):
        with pytest.raises(PeftfxError, match=message):
            model.add_weighted_adapter(names, [1.0] * len(names), "sum", how)
    with pytest.raises(PeftfxError, match="2 adapters and 1 weight"):
        model.add_weighted_adapter(["a", "b"], [1.0], "sum")
    assert model.active == before
    assert "sum" not in model.names()
