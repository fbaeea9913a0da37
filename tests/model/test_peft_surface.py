"""HF PEFT's names on an adapted model, each held to `peft`: the same adapters on the same base, asked the same."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support.adapted import adapt, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.model.adapted import AdaptedModel

FIRST = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
COMING = Path(__file__).parents[2] / "docs" / "coming-from-peft.md"
OTHERS = [{"lora_alpha": 3}, {"r": 8}, {"r": 2, "target_modules": ["v_proj"]}, {"rank_pattern": {"0.*q_proj": 2}}]
SECOND = {"r": 2, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random adapters that `peft` saved, `one` and `two`."""
    directory = tmp_path_factory.mktemp("adapters")
    model = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(**FIRST), "one")
    model.add_adapter("two", peft.LoraConfig(**SECOND))
    model.base_model.set_adapter(["two"])
    randomise(model, 3)
    model.set_adapter("one")
    randomise(model, 5)
    model.save_pretrained(str(directory))
    return directory


@pytest.fixture
def pair(saved: Path) -> tuple[AdaptedModel, peft.PeftModel]:
    """The first adapter active, the second beside it: ours, and `peft`'s own."""
    ours = peftfx.load(ZOO["llama"].build(), saved / "one", "one")
    ours.load_adapter(saved / "two", "two")
    ours.set_adapter("one")
    theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(saved / "one"), "one", is_trainable=True)
    theirs.load_adapter(str(saved / "two"), "two")
    return ours.eval(), theirs.eval()


def inputs(model: nn.Module, batch: int = 5) -> dict[str, Tensor]:
    return ZOO["llama"].inputs(batch, 6, model=model)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_names_states_and_status(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    ours, theirs = pair
    assert isinstance(ours.get_base_model(), type(theirs.get_base_model()))
    assert (ours.active_adapter, ours.active_adapters) == (theirs.active_adapter, theirs.active_adapters)
    assert (ours.has_active_enabled_adapter, ours.base_model_torch_dtype) == (True, theirs.base_model_torch_dtype)
    assert ours.active_peft_config.r == theirs.active_peft_config.r
    with ours.disable_adapter(), theirs.disable_adapter():
        assert ours.has_active_enabled_adapter == theirs.has_active_enabled_adapter is False
        with pytest.raises(PeftfxError, match="0 adapters are active"):
            _ = ours.active_peft_config
    assert ours.get_input_embeddings() is ours.base.model.embed_tokens
    assert ours.get_output_embeddings() is ours.base.lm_head
    for name, config in theirs.peft_config.items():
        mine = ours.peft_config[name]
        assert mine.peft_type == config.peft_type
        assert (mine.r, set(mine.target_modules), mine.is_prompt_learning) == (config.r, config.target_modules, False)
        assert mine.inference_mode == (name != "one")
        want = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        got = peftfx.get_peft_model_state_dict(ours, name)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    got_layers = {layer.name: dataclasses.asdict(layer) for layer in ours.get_layer_status()}
    want_layers = {layer.name: dataclasses.asdict(layer) for layer in theirs.get_layer_status()}
    assert got_layers == want_layers
    got, want = (dataclasses.asdict(model.get_model_status()) for model in pair)
    assert {**got, "adapter_model_type": "", "total_params": 0} == {**want, "adapter_model_type": "", "total_params": 0}


def test_every_public_name_of_peft_is_here_or_in_the_table() -> None:
    """Those of `PeftModel`, and those of `LoraModel` that it passes on."""
    ours = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA())
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(**options))
    classes = (*type(theirs).__mro__, *type(theirs.base_model).__mro__)
    found = {name for cls in classes for name in vars(cls)} | {*vars(theirs), *vars(theirs.base_model)}
    names = {name for name in found - {*dir(nn.Module), *vars(nn.Module())} if not name.startswith("_")}
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]*`", COMING.read_text(encoding="utf-8")))))
    assert {name for name in names if not (hasattr(ours, name) or name in told)} == set()


def test_set_requires_grad_and_delete(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    for model in pair:
        model.set_requires_grad("one", False)
        model.set_requires_grad(["two"])
    assert [m.get_model_status().requires_grad for m in pair] == [{"one": False, "two": True}] * 2
    ours, theirs = pair
    with pytest.warns(PeftfxWarning, match="'two' is now"):
        ours.delete_adapter("one")
    theirs.delete_adapter("one")
    assert ours.active_adapters == theirs.active_adapters == ["two"]
    close(ours(**inputs(ours.base)).logits, theirs(**inputs(ours.base)).logits)
    with pytest.raises(PeftfxError, match="no adapter named"):
        ours.delete_adapter("one")


def test_the_first_by_name_acts_after_the_active_one_is_deleted(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    for model in pair:
        model.add_adapter("a", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("one")
        with pytest.warns(UserWarning, match="'?a'?"):
            model.delete_adapter("one")
    assert [model.active_adapters for model in pair] == [["a"], ["a"]]


@pytest.mark.parametrize("rule", ["lora(r=2)@attention.query", peftfx.PromptTuning(num_virtual_tokens=3)])
def test_without_its_last_adapter_the_base_stays_frozen(rule: object) -> None:
    base = ZOO["llama"].build()
    ours, given = peftfx.transform(base, rule).eval(), inputs(base, 2)
    ours.delete_adapter("default")
    assert (ours.active_adapters, ours.get_nb_trainable_parameters()[0]) == ([], 0)  # in peft, too
    assert not ours(**given).logits.requires_grad
    ours.add_adapter("default", "ia3@mlp.down")
    ours.delete_adapter("default")
    assert all(p.requires_grad for p in ours.unload().parameters())


def test_each_row_with_its_adapter(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    ours, theirs = pair
    names = ["two", "__base__", "one", "one", "two"]
    given = inputs(ours.base)
    with torch.no_grad():
        got = ours(**given, adapter_names=names).logits
        close(got, theirs(**given, adapter_names=names).logits)
        for row, name in enumerate(names):
            alone = {key: value[row : row + 1] for key, value in given.items()}
            ours.set_adapter(() if name == "__base__" else name)
            close(got[row : row + 1], ours(**alone).logits)
    with pytest.raises(PeftfxError, match="no adapter named 'three'"):
        ours(**given, adapter_names=["three"] * 5)
    for count in (0, 4):
        with pytest.raises(PeftfxError, match=f"{count} names are given, and the call has 5 rows"):
            ours(**given, adapter_names=["__base__"] * count)
    with pytest.raises(PeftfxError, match="eval"):
        ours.train()(**given, adapter_names=names)


def test_no_row_has_an_adapter_while_adapters_are_disabled(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    ours, theirs = pair
    given, names = inputs(ours.base), ["two", "__base__", "one", "one", "two"]
    with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
        want, got = (model(**given, adapter_names=names).logits for model in (theirs, ours))
        assert torch.equal(got, ours(**given).logits)
        with pytest.raises(PeftfxError, match="no adapter named 'three'"):
            ours(**given, adapter_names=["three"] * 5)
    close(got, want)


def test_each_row_has_its_own_copies_of_modules_and_embeddings() -> None:
    ours = adapt("llama", peftfx.LoRA(target_modules=["embed_tokens"], modules_to_save=["lm_head"]))
    given = inputs(ours.eval().base, 3)
    with torch.no_grad():
        got = ours(**given, adapter_names=["default", "__base__", "default"]).logits
        whole = ours(**given).logits
        with ours.disable_adapter():
            plain = ours(**given).logits
    close(got, torch.stack([whole[0], plain[1], whole[2]]))
    assert not torch.allclose(whole[1], plain[1])


@pytest.mark.parametrize("names", [None, ["two"]])
def test_merge_and_unload(pair: tuple[AdaptedModel, peft.PeftModel], names: list[str] | None) -> None:
    ours, theirs = (model.merge_and_unload(safe_merge=True, adapter_names=names) for model in pair)
    assert type(ours) is type(theirs)
    close(ours(**inputs(ours)).logits, theirs(**inputs(ours)).logits)


def test_unload_gives_the_base_back(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    ours, theirs = (model.unload() for model in pair)
    assert torch.equal(ours(**inputs(ours)).logits, theirs(**inputs(ours)).logits)


def test_other_tensors_in_place(pair: tuple[AdaptedModel, peft.PeftModel], tmp_path: Path) -> None:
    ours, theirs = pair
    kept = {name: id(t) for name, t in ours.adapter("one").tensors()}
    state = {name: 1.5 * t for name, t in peftfx.get_peft_model_state_dict(ours, "one").items()}
    peftfx.set_peft_model_state_dict(ours, state, "one")
    peft.set_peft_model_state_dict(theirs, state, "one")
    given = inputs(ours.base)
    close(ours(**given).logits, theirs(**given).logits)
    theirs.set_adapter("two")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".two" in name:
                parameter.mul_(0.5)
    theirs.save_pretrained(str(tmp_path), selected_adapters=["two"])
    peftfx.hotswap_adapter(ours, tmp_path / "two", "two")
    ours.set_adapter("two")
    close(ours(**given).logits, theirs(**given).logits)
    hotswap_adapter(theirs, str(tmp_path / "two"), "two")
    close(ours(**given).logits, theirs(**given).logits)
    assert kept == {name: id(t) for name, t in ours.adapter("one").tensors()}
    with pytest.raises(PeftfxError, match="places or options differ"):
        peftfx.hotswap_adapter(ours, tmp_path / "two", "one")


@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize("options", OTHERS)
def test_an_adapter_of_other_ranks_or_scales_in_its_place(options: dict[str, Any], road: str, tmp_path: Path) -> None:
    old: dict[str, Any] = {**FIRST, "init_lora_weights": False}
    for name, own in (("old", old), ("new", {**old, **options}), ("biased", {**old, **options, "bias": "all"})):
        peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(**own)).save_pretrained(str(tmp_path / name))
    theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path / "old")).eval()
    ours = peftfx.load(ZOO["llama"].build(), tmp_path / "old", road=road).eval()
    ours.add_adapter("more", peftfx.LoRA(r=2, target_modules=["q_proj"]))
    ours.set_adapter(["default", "more"])
    ours.set_requires_grad("default", road == "modules")  # the new tensors are trained if the old ones are
    with pytest.raises(PeftfxError, match="places or options differ"):
        peftfx.hotswap_adapter(ours, tmp_path / "biased")
    if "rank_pattern" in options:  # peft swaps it in with another scale: docs/where-peft-differs.md
        theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path / "new")).eval()
    else:
        hotswap_adapter(theirs, str(tmp_path / "new"), "default")
    peftfx.hotswap_adapter(ours, tmp_path / "new")
    given = inputs(ours.base)
    close(ours(**given).logits, theirs(**given).logits)
    assert (ours.names(), ours.active) == (("default", "more"), ("default", "more"))
    assert {p.requires_grad for p in ours.adapter("default").parameters()} == {road == "modules"}
    state = peftfx.get_peft_model_state_dict(peftfx.load(ZOO["llama"].build(), tmp_path / "old"))
    with pytest.raises(PeftfxError):
        peftfx.set_peft_model_state_dict(ours, {**state, "base_model.model.more.lora_A.weight": torch.ones(4, 4)})


def test_a_config_is_a_rule(pair: tuple[AdaptedModel, peft.PeftModel]) -> None:
    ours, _ = pair
    ours.add_adapter("three", ours.peft_config["one"])
    own, other = ours.adapter("one"), ours.adapter("three")
    assert {n: t.shape for n, t in own.tensors()} == {n: t.shape for n, t in other.tensors()}


def test_a_card_is_saved_where_there_is_none(tmp_path: Path) -> None:
    ours = adapt("llama", peftfx.LoRA())
    ours.add_model_tags(["sft", 'it\'s "mine"'])
    ours.base.config._name_or_path = "some/base"
    ours.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "some/base")
    assert card.data.tags == sorted(["base_model:adapter:some/base", "lora", "sft", 'it\'s "mine"'])
    (tmp_path / "README.md").write_text("mine")
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_state_of_peft_that_fits_nothing_is_told() -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    randomise(theirs)
    state, ours = peft.get_peft_model_state_dict(theirs), adapt("llama", peftfx.LoRA(r=4, target="attention.query"))
    with pytest.warns(PeftfxWarning, match=r"nothing is loaded(.|\n)*peftfx\.set_peft_model_state_dict"):
        ours.load_state_dict(state, strict=False)
    with pytest.raises(PeftfxError, match=r"peftfx\.set_peft_model_state_dict"):
        ours.load_state_dict(state)
    peftfx.set_peft_model_state_dict(ours, state)
    batch = inputs(ours.base, 2)
    assert torch.allclose(ours.eval()(**batch).logits, theirs.eval()(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_functions_of_peft_for_states_name_those_of_peftfx(soft: bool, tmp_path: Path) -> None:
    """They look for layers of `peft`: they gave no tensor, and loaded none."""
    rule = peftfx.PromptTuning(num_virtual_tokens=3) if soft else peftfx.LoRA(r=4, modules_to_save=["lm_head"])
    ours = adapt("llama", rule)
    ours.save_pretrained(tmp_path)
    state = peftfx.get_peft_model_state_dict(ours)
    for name, given in (
        ("get_peft_model_state_dict", ()),
        ("set_peft_model_state_dict", (state,)),
        ("hotswap_adapter", (str(tmp_path), "default")),
    ):
        with pytest.raises(PeftfxError, match=rf"layers(.|\n)*call peftfx\.{name}:"):
            (getattr(peft, name, None) or hotswap_adapter)(ours, *given)
    assert ours.peft_config["default"].peft_type == ours.active_peft_config.peft_type


def test_the_hub_is_asked_online_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PeftfxError, match="HF_HUB_OFFLINE"):
        adapt("llama", peftfx.LoRA()).push_to_hub("someone/adapter")


def test_what_has_no_answer_is_refused() -> None:
    model = adapt("llama", [peftfx.LoRA(target="attention"), peftfx.IA3(target="mlp.down")])
    with pytest.raises(PeftfxError, match="an adapter of 2 rules"):
        _ = model.peft_config["default"]
    prompt = adapt("llama", peftfx.PromptTuning(num_virtual_tokens=3)).eval()
    with pytest.raises(PeftfxError, match="before the modules"):
        prompt.get_layer_status()
    with pytest.raises(PeftfxError, match="soft prompt"):
        prompt(**inputs(prompt.base, 2), adapter_names=["default", "__base__"])
    with pytest.raises(PeftfxError, match="soft prompt"):
        prompt.merge_and_unload()
    assert prompt.active == ("default",)


def test_adapters_are_added_loaded_and_saved_by_the_names_of_pefts_arguments(saved: Path, tmp_path: Path) -> None:
    """Each was a `TypeError`."""
    ours, theirs = peftfx.load(ZOO["llama"].build(), saved / "one"), ZOO["llama"].build()
    theirs = peft.PeftModel.from_pretrained(theirs, str(saved / "one"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for model in (ours, theirs):
        model.load_adapter(str(saved / "two"), adapter_name="two", is_trainable=False, device_map="auto")
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".two." in n)
        model.add_adapter(adapter_name="three", peft_config=config, low_cpu_mem_usage=True)
        model.save_pretrained(save_directory=str(tmp_path / type(model).__name__), selected_adapters=["two"])
        sums = {"adapters": ["default", "two"], "weights": [0.5, 0.4], "combination_type": "svd", "svd_rank": 3}
        model.add_weighted_adapter(adapter_name="sum", svd_full_matrices=True, svd_driver=None, **sums)
        model.set_adapter("sum")
    ours.set_adapter("two")
    assert all(p.requires_grad for p in ours.adapter("two").parameters())
    want = load_file(tmp_path / type(theirs).__name__ / "two" / "adapter_model.safetensors")
    got = load_file(tmp_path / type(ours).__name__ / "two" / "adapter_model.safetensors")
    torch.testing.assert_close(got, want)
    ours.set_adapter("sum")
    batch = inputs(ours.base, 2)
    close(ours.eval()(**batch).logits, theirs.eval()(**batch).logits)
    with pytest.raises(PeftfxError, match=r"made in float32(.|\n)*cast the adapter afterwards"):
        ours.add_adapter("half", config, autocast_adapter_dtype=False)
    for wrong in ({"key_mapping": {"a": "b"}}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(PeftfxError, match=next(iter(wrong))):
            ours.load_adapter(saved / "two", "wrong", **wrong)
    with pytest.raises(PeftfxError, match=r'snapshot_download\("someone/adapter"\)'):
        ours.load_adapter("someone/adapter", "wrong")


def test_two_names_are_exchanged_and_the_arguments_stay(saved: Path) -> None:
    """`get_peft_model` and `from_pretrained` become `transform` and `load`: each argument here was a `TypeError`."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for make in (peftfx.transform, peft.get_peft_model):
        base = ZOO["llama"].build()
        options = {"low_cpu_mem_usage": False, "autocast_adapter_dtype": True, "revision": "v1"}
        made = make(base, peft_config=config, adapter_name="a", **options)
        assert (made.active_adapters, made.peft_config["a"].revision) == (["a"], "v1")
    with pytest.raises(PeftfxError, match="made in float32"):
        peftfx.transform(ZOO["llama"].build(), config, autocast_adapter_dtype=False)
    for load in (peftfx.load, peft.PeftModel.from_pretrained):
        base = ZOO["llama"].build().train()
        config = peft.PeftConfig.from_pretrained(str(saved / "one"))
        options = {"subfolder": "one", "revision": "main", "token": None, "use_safetensors": True, "config": config}
        made = load(base, str(saved), "a", is_trainable=False, **options)
        assert (made.training, made.get_nb_trainable_parameters()[0]) == (False, 0)
        made.train()
        made.load_adapter(str(saved), "b", is_trainable=True, subfolder="two")
        assert made.training
        made.load_adapter(str(saved), "c", is_trainable=False, subfolder="two")
        assert not made.training
        state = made.state_dict()
    config.lora_alpha = 99
    with pytest.raises(PeftfxError, match="lora_alpha is 99 there"):
        peftfx.load(ZOO["llama"].build(), saved / "one", config=config)
    own = peftfx.get_peft_model_state_dict(made := peftfx.load(ZOO["llama"].build(), saved / "one"))
    assert own.keys() == peftfx.get_peft_model_state_dict(made, state_dict=made.state_dict()).keys()
    with pytest.raises(PeftfxError, match="takes no other state"):
        peftfx.get_peft_model_state_dict(made, state_dict=state)
    for missing, unexpected in (
        peftfx.set_peft_model_state_dict(made, own, low_cpu_mem_usage=False),
        made.load_adapter(str(saved / "one"), "default"),
    ):
        assert (missing, unexpected) == ([], [])
    with pytest.raises(PeftfxError, match="ignore_mismatched_sizes"):
        peftfx.set_peft_model_state_dict(made, own, ignore_mismatched_sizes=True)


def test_a_config_is_read_and_its_records_are_set(tmp_path: Path) -> None:
    """Set there, any field was lost without a word; a field that is None in `peft` was an `AttributeError`."""
    ours = adapt("llama", peftfx.LoRA(r=4))
    config = ours.peft_config["default"]
    assert (config.modules_to_save, config.eva_config, config.target_parameters) == (None, None, None)
    assert (config.peft_type.value, config.task_type) == ("LORA", None)
    config.base_model_name_or_path, config.task_type = "some/base", peft.TaskType.CAUSAL_LM
    ours.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (read.base_model_name_or_path, read.task_type) == ("some/base", "CAUSAL_LM")
    config.r = 4
    with pytest.raises(PeftfxError, match=r"would not change with it(.|\n)*copy\.deepcopy"):
        config.r = 8
    other = copy.deepcopy(config)
    other.r = 8
    ours.add_adapter("other", other)
    assert [ours.peft_config[name].r for name in ("default", "other")] == [4, 8]
