"""What is said of options that make no sense, before and in a training."""

from __future__ import annotations

import re
import warnings

import peft
import pytest
import torch
from support.zoo import ZOO
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning

IDS = torch.arange(3, 13)[None]


def llama() -> LlamaForCausalLM:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **size))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda: peftfx.LoRA(rank_pattern={"q_proj": 0}), "1 or more, not 0 [rank_pattern, q_proj]"),
        (lambda: peftfx.LoHa(rank_pattern={"q_proj": -1}), "1 or more, not -1 [rank_pattern, q_proj]"),
        (lambda: peftfx.FourierFT(n_frequency_pattern={"v_proj": 0}), "1 or more, not 0 [n_frequency_pattern, v_proj]"),
    ],
)
def test_a_pattern_s_value_that_is_too_small_is_named_with_its_key(rule: object, said: str) -> None:
    with pytest.raises(PeftfxError, match=re.escape(said)):
        rule()  # type: ignore[operator]


def test_an_empty_list_of_modules_is_told_as_that() -> None:
    with pytest.raises(PeftfxError, match=r"it names no module.*\[target_modules\]"):
        peftfx.transform(llama(), peft.LoraConfig(target_modules=[], task_type="CAUSAL_LM"))


def test_the_class_of_a_config_is_no_rule() -> None:
    with pytest.raises(PeftfxError, match="not a rule: <class 'peft"):
        peftfx.transform(llama(), peft.LoraConfig)


@pytest.mark.parametrize("excluded", [["zz"], "zz.*", ["layers.0"]])
def test_exclude_modules_that_exclude_nothing_are_told(excluded: object) -> None:
    with pytest.warns(PeftfxWarning, match="exclude_modules=.* excludes nothing"):
        peftfx.transform(llama(), peftfx.LoRA(target_modules=["q_proj"], exclude_modules=excluded))  # type: ignore[arg-type]


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.q_proj"], r".*\.1\..*", ["lm_head"]])
def test_exclude_modules_that_name_a_layer_are_not(excluded: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        peftfx.transform(llama(), peftfx.LoRA(target_modules=["q_proj"], exclude_modules=excluded))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["pissa", "mica"])
def test_a_start_from_a_weight_with_nan_names_the_weight(start: str) -> None:
    base = llama()
    base.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PeftfxError, match=r"NaN or an infinity \[model.layers.1.self_attn.q_proj\]"):
        peftfx.transform(base, peftfx.LoRA(r=2, init_lora_weights=start))


@pytest.mark.parametrize("asked", ["use_cache", "past_key_values"])
def test_a_graph_s_call_that_is_given_or_asked_for_a_cache_says_that_it_has_none(asked: str) -> None:
    model = peftfx.transform(llama(), peftfx.LoRA(r=2), road="graph")
    with torch.no_grad():
        past = model.base(input_ids=IDS, use_cache=True).past_key_values
    given = {"use_cache": True, "past_key_values": past}[asked]
    with pytest.raises(PeftfxError, match=rf"no cache of keys and values \[{asked}\]") as told:
        model(input_ids=IDS, **{asked: given})
    assert 'road="modules"' in str(told.value)
    model(input_ids=IDS, use_cache=False, past_key_values=None)


def test_a_hook_that_no_graph_can_have_names_the_other_road() -> None:
    """`Trainer(neftune_noise_alpha=)` sets such a hook."""
    model = peftfx.transform(llama(), peftfx.LoRA(r=2), road="graph")

    def noise(module: nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        size = 5 / torch.sqrt(torch.tensor(output.size(1) * output.size(2)))
        return output + torch.zeros_like(output).uniform_(-size, size)  # as transformers writes it

    model.get_input_embeddings().register_forward_hook(noise)
    with pytest.raises(PeftfxError, match=r'branches(.|\n)*other road: peftfx\.transform\(\.\.\., road="modules"\)'):
        model(input_ids=IDS)


@pytest.mark.parametrize("given", [{}, {"input_ids": [[3, 4]]}])
def test_a_graph_s_call_without_a_tensor_says_so(given: dict[str, object]) -> None:
    model = peftfx.transform(llama(), peftfx.LoRA(r=2), road="graph")
    with pytest.raises(PeftfxError, match="the call gives no tensor"):
        model(**given)


def test_the_weight_of_a_conv_among_target_parameters_is_told_as_that() -> None:
    rule = peftfx.LoRA(r=2, target_parameters=["mix.weight"])
    with pytest.raises(PeftfxError, match=r"this is one of conv \[mix.weight\]") as told:
        peftfx.transform(ZOO["custom"].build(), rule, inputs=ZOO["custom"].inputs())
    assert "target_modules: mix" in str(told.value)
